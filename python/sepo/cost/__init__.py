"""Model what a run costs: FLOP, bytes and hours by formula, of a model that need not be here.

command.py  `sepo plan`, and which of these answers it
planner.py  hours of each stage of a recipe    batches.py  how full and even micro-batches are
tables.py   SePO's Table 1, saving by saving   paper.py    its setting and figures
public.py   a run that others published
decoder.py  what there is to compute a token, from a transformers config
work.py     FLOP, bytes and traffic of a step, each with the part of the step that causes it
gpu.py      seconds that a GPU takes for them, with the utilisation that is assumed
lengths.py  lengths of a data set of which only means are known
"""
