"""What a round makes a contender do: tokens, rows, and the FLOP that its model has to compute."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from sepo.cost.decoder import Decoder
from sepo.cost.work import Schedule, needed_flop, step_work
from sepo.data.types import TokenPair


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
    *,
    prompt_once: bool,
    forwards: int = 0,  # 1: a live reference
    heads: int = 0,  # 1: the head alone, on a reference's cached rows
) -> float:
    """Two FLOP a weight and token forward, twice that backward; attention over its causal half.

    Neither padding nor logits of rows that the loss does not use, nor what is computed again: so a
    utilisation made from it falls with all three.
    """
    reference = "live" if forwards else "cached" if heads else "none"
    schedule = Schedule(prompt_once=prompt_once, reference=reference, kl=bool(heads))
    return needed_flop(step_work(Decoder.of(model), np.array(sizes), rows, schedule))


def padded(
    model: PreTrainedModel,
    pairs: list[TokenPair],
    *,
    forwards: int,  # as `training` has it
    used_alone: bool = False,  # the head takes what the loss uses
    unused: int = 0,  # positions of each response that the head leaves out
) -> Work:
    """Of whole responses, each after its prompt, all as long as the longest."""
    sizes = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    used = sum(c + r for _, c, r in sizes)
    tokens = 2 * len(sizes) * max(p + max(c, r) for p, c, r in sizes)
    rows = used if used_alone else tokens - 2 * len(sizes) * unused
    flop = training(model, sizes, used, prompt_once=False, forwards=forwards)
    return Work(tokens, rows, flop)
