"""Model what a run costs: FLOP, bytes and hours by formula, of a model that need not be here.

planner.py  hours of each stage of a recipe    keys.py     the recipe, and a few more keys
epochs.py   hours of an epoch by each trainer  batches.py  how full and even micro-batches are
tables.py   SePO's Table 1, saving by saving   paper.py    its setting
published.py  the hours that it published      public.py   a run that others published
hypotheses.py  named costs fitted to its hours verdict.py  the hours beside them, as text
decoder.py  what there is to compute a token, from a transformers config
work.py     FLOP, bytes and traffic of a step, each with the part of the step that causes it
gpu.py      seconds that a GPU takes for them, with the utilisation that is assumed
lengths.py  lengths of a data set of which only means are known
"""
