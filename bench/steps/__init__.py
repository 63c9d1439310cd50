"""Whole steps, beside TRL's and beside full softmaxes: `bench/run.py --suite step`."""
