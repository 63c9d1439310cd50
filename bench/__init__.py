"""What the operations cost, beside what they replace: `make bench`. Nothing imports this package.

end_to_end/  whole training steps beside TRL's: `make bench-steps`

operations/  cases, inputs, float64 truth        providers/  the contenders, one file each
harness.py   gate, then memory, then rounds      measure.py  clock and allocator
suite.py     everything, also without pytest     report.py   tables and JSON lines
"""
