"""What it costs, beside what it replaces: `python bench/run.py`. Nothing imports this package.

run.py        the one program                   jobs.py     every case, by suite
harness.py    a case: gate, memory, rounds      contender.py  what takes part in one
operations/   cases, inputs, float64 truth      contenders/   who takes part, of operations
steps/        whole steps: cases, inputs, contenders, tables
drop_in.py    TRL's trainers on both heads, by itself: `python -m bench.drop_in`
plain.py      the straightforward computation   precision.py  errors, limits, the faster dtype
measure.py    clock, allocator, roof            base.py       the same cases at another commit
report.py     tables and JSON lines             figure.py     the same as bars
test_ops.py   our own operations over time: `make bench-ops`
ledger.py     what a process is at, for tools/gpu.py, which marks what killed it
"""
