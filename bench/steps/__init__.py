"""What a training step costs from end to end: `bench/run.py --suite step`.

case.py    the cases: model, pairs, contenders   inputs.py      rounds, gate and memory of a step
models.py  one set of weights, and one AdamW     pairs.py       the pairs, the same for all
trl.py     TRL's trainers, as users run them     ours.py        SePOTrainer
dense.py   a KL step with the logits of both     savings.py     each saving switched on in turn
table.py   tables and bars                       objectives.py  what all minimise
work.py    tokens, rows, FLOP
"""
