"""What a step costs that needs the reference's whole distribution: --case step-tdpo2 step-sparsepo

dense.py    the straightforward way, with the logits of both models; also the gate's truth
ours.py     SePOTrainer, with a live reference and with its cached rows
job.py      a race as bench/run.py takes it

Rows, weights, gate, rounds and tables are those of bench.end_to_end.
"""
