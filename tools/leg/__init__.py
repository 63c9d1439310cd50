"""The GPU leg's machinery, none of which needs a GPU: tools/gpu.py is the program.

stages.py   processes with limits, one after the other, each alone
order.py    which they are, in order        watched.py  compute-sanitizer, which may refuse
wheels.py   packages that were carried here found.py    what was measured, what was not, in words
trace.py    a profile of one step

What a process is at, so that the next one leaves out what killed it, stands in bench/ledger.py.
"""
