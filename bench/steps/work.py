"""What a round makes a contender do: tokens, rows, and the FLOP that its model has to compute."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from sepo.cost.decoder import Decoder
from sepo.cost.work import OURS, Schedule, needed_flop, step_work
from sepo.data.segments import num_selected
from sepo.data.types import CutPair, TokenPair


@dataclass(frozen=True)
class Work:
    """Of one round."""

    tokens: int  # positions that the policy's trunk computes, padding included
    rows: int  # of them through the head
    flops: float  # that the model has to compute: no padding, no recomputation


def training(
    model: PreTrainedModel,
    sizes: list[tuple[int, int, int]],  # tokens read of prompt, chosen, rejected
    rows: int,  # through the head
    schedule: Schedule = OURS,
) -> float:
    """Two FLOP a weight and token forward, twice that backward; attention over its causal half.

    Neither padding nor logits of rows that the loss does not use, nor what is computed again: so a
    utilisation made from it falls with all three.
    """
    return needed_flop(step_work(Decoder.of(model), np.array(sizes), rows, schedule))


def packed(
    model: PreTrainedModel,
    cut: list[CutPair],
    schedule: Schedule = OURS,
    *,
    every_row: bool = False,
) -> Work:
    """Of responses as they are cut, end to end; the head takes every row, or what the loss uses."""
    sizes = [(len(p), len(c.response), len(r.response)) for p, c, r in cut]
    tokens = sum((1 if schedule.prompt_once else 2) * p + c + r for p, c, r in sizes)
    used = sum(map(num_selected, cut))
    return Work(tokens, tokens if every_row else used, training(model, sizes, used, schedule))


def padded(
    model: PreTrainedModel,
    pairs: list[TokenPair],
    *,
    live: bool = False,  # a reference model
    used: int | None = None,  # tokens that the loss uses; None: all of the responses
    used_alone: bool = False,  # the head takes what the loss uses
    unused: int = 0,  # positions of each response that the head leaves out
) -> Work:
    """Of whole responses, each after its prompt, all as long as the longest."""
    sizes = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    used = sum(c + r for _, c, r in sizes) if used is None else used
    tokens = 2 * len(sizes) * max(p + max(c, r) for p, c, r in sizes)
    rows = used if used_alone else tokens - 2 * len(sizes) * unused
    schedule = Schedule(prompt_once=False, reference="live" if live else "none")
    return Work(tokens, rows, training(model, sizes, used, schedule))
