"""What it costs, beside what it replaces: `python bench/run.py`. Nothing imports this package.

run.py       the one program                      jobs.py     every case, by suite
harness.py   a case: gate, memory, rounds         operations/ cases, inputs, float64 truth
providers/   the contenders, one file each        end_to_end/ whole steps beside TRL's
kl_steps/    steps with a KL of both models       measure.py  clock and allocator
roof.py      a product and a copy beside a case   base.py     the same cases at another commit
report.py    tables and JSON lines                figure.py   the same as bars
readme.py    docs/benchmarks.md, of results/   gpu.py      everything on a GPU: `make gpu`
dtypes.py    what a device multiplies fastest
cost/        FLOP and bytes of a step             hours.py    GPU-hours made of them
plan.py      how full and even the steps are
"""
