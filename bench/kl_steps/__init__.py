"""What a step costs that needs the reference's whole distribution: `python -m bench.kl_steps`.

dense.py    the straightforward way, with the logits of both models; also the gate's truth
ours.py     SePOTrainer, with a live reference and with its cached rows

Rows, weights, gate, rounds and tables are those of bench.end_to_end.
"""
