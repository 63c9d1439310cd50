"""What a training step costs: FLOP and bytes by formula, of a model that need not be at hand.

decoder.py  what there is to compute a token, from a transformers config
work.py     FLOP, bytes and traffic of a step, each with the part of the step that causes it
gpu.py      seconds that a GPU takes for them, with the utilisation that is assumed
lengths.py  lengths of a data set of which only means are known
"""
