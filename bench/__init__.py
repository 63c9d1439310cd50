"""What the operations cost, beside what they replace: `make bench`. Nothing imports this package.

operations/  cases, inputs, float64 truth        providers/  the contenders, one file each
harness.py   gate, then memory, then rounds      measure.py  clock and allocator
suite.py     everything, also without pytest     report.py   tables and JSON lines
"""
