"""FLOP that a model has to compute for a set of pairs, and what the machine could do at most."""

import numpy as np
import torch
from transformers import PreTrainedModel

from sepo.cost import gpu
from sepo.cost.decoder import Decoder
from sepo.cost.work import Schedule, needed_flop, step_work


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


def peak() -> float | None:
    """Of this machine's GPU; None for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    found = gpu.of_device(torch.cuda.get_device_name())
    return found.flop if found else None
