"""Ours: SePOTrainer with the reference beside it, and with the rows that a store keeps of it."""

from dataclasses import replace

import torch

from bench.end_to_end.contender import Contender
from bench.end_to_end.ours import contender
from bench.end_to_end.weights import Weights, twin
from bench.kl_steps.settings import SETTINGS
from sepo.data.hidden import HiddenRows, StoredHead
from sepo.data.types import ScoredPair, TokenPair
from sepo.masks import SparseMask, num_layers
from sepo.model.prepare import head, prepare_model
from sepo.model.reference import CachedReference
from sepo.score.logp import response_logp


def contenders(
    objective: str, weights: Weights, rounds: list[list[TokenPair]], *, bf16: bool
) -> list[Contender]:
    live = twin(weights.reference)

    def ours(note: str, pairs: list[list], reference, **options) -> Contender:
        name, settings = f"{objective}{note}", SETTINGS[objective]
        return contender(
            name, objective, weights, pairs, settings, bf16=bf16, reference=reference, **options
        )

    found = [ours("", rounds, live)]
    if objective == "tdpo2":  # a mask reads the reference's layers, which no store keeps
        found.append(ours(", cached rows", *cached(weights, rounds)))
    found.append(ours(", cheap again", rounds, live, recompute="cheap"))
    again = ours(", checkpointing", rounds, live, checkpointing=True)
    return [*found, replace(again, turns=0)]


def cached(
    weights: Weights, rounds: list[list[TokenPair]]
) -> tuple[list[list[ScoredPair]], CachedReference]:
    """The rounds as `sepo score --keep hidden` leaves them, in memory.

    Round 0, the gate's, has its rows in float32: a store's bfloat16 would be seen there, and hide
    what else is wrong.
    """
    reference = prepare_model(twin(weights.reference))
    dtypes = [torch.float32] + [torch.bfloat16] * (len(rounds) - 1)
    kept = [with_rows(reference, pairs, of) for pairs, of in zip(rounds, dtypes, strict=True)]
    return kept, CachedReference(StoredHead(*head(reference)))


def with_rows(reference, pairs: list[TokenPair], dtype: torch.dtype) -> list[ScoredPair]:
    count = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    rows = torch.empty(count, reference.config.hidden_size, dtype=dtype)
    response_logp(reference, pairs, "reference", max_tokens=8192, hidden=rows)
    found, end = [], 0
    for pair in pairs:
        handles = {}
        for side in ("chosen", "rejected"):
            start, end = end, end + len(getattr(pair, side))
            handles[f"{side}_ref_hidden"] = HiddenRows(rows, start, end - start)
        tokens = dict(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected)
        found.append(ScoredPair(id=pair.id, **tokens, **handles))
    return found


def new_mask(weights: Weights) -> SparseMask:
    """As it is when it has learned: with a new one all masks are near 0, and so is every gradient."""
    torch.manual_seed(0)
    model = weights.reference
    mask = SparseMask(num_layers(model), model.config.hidden_size)
    with torch.no_grad():
        mask.reward.mixer.normal_()
    return mask.to(model.device)
