"""From rows of a data set to one packed micro-batch. numpy until the packer's last line."""

from sepo.data.align import transfer_scores, transfer_selection
from sepo.data.cost import attention_cost, pair_costs
from sepo.data.pack import pack
from sepo.data.plan import StepPlan, num_steps, plan_step
from sepo.data.selection import Selection, all_positions, random_positions, select_positions
from sepo.data.truncate import truncate
from sepo.data.types import CutPair, PackedBatch, ScoredPair, Segment, TokenPair

__all__ = [
    "CutPair",
    "PackedBatch",
    "ScoredPair",
    "Segment",
    "Selection",
    "StepPlan",
    "TokenPair",
    "all_positions",
    "attention_cost",
    "num_steps",
    "pack",
    "pair_costs",
    "plan_step",
    "random_positions",
    "select_positions",
    "transfer_scores",
    "transfer_selection",
    "truncate",
]
