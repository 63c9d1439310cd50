"""What a training step costs from end to end, beside TRL: `bench/run.py --suite step`.

models.py     the models and their pairs          rows.py     the rounds, the same for all
weights.py    one set of weights and one AdamW    contender.py  what a contender is
trl.py        TRL's trainers, as users run them   ours.py     SePOTrainer
savings.py    each saving switched on in turn     objectives.py  what they minimise
race.py       gate, then memory, then rounds      gate.py     right in float32, or not timed
table.py      tables and bars                     flops.py    what a model has to compute
job.py        a race as bench/run.py takes it
"""
