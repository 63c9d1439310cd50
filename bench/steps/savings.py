"""Where the time goes: the same loss, with each saving switched on after the one before.

unpacked    one padded response a row, the model's own forward, logits of every position
packed      no padding: responses end to end, each after a prompt of its own
shared      the prompt once for both responses
truncated   nothing after the last selected token
selected    logits of the selected rows only
fused       the same rows in one operation that keeps no logits
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bench import plain
from bench.contender import Contender
from bench.steps import work
from bench.steps.inputs import Truth
from bench.steps.models import Weights
from bench.steps.objectives import loss, segments
from sepo.data.pack import pack
from sepo.data.segments import num_selected
from sepo.data.types import CutPair, PackedBatch, ScoredPair, Segment
from sepo.model.forward import head, hidden_states, token_logprob
from sepo.model.prepare import prepare_model

# logp (M,), the reference's or None, cu_rows (S + 1,)
Found = tuple[Tensor, Tensor | None, Tensor]
EMPTY = Segment(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))


def unpacked(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    device = model.device
    ids, mask = plain.padded(pairs, device)
    logp = plain.of_targets(plain.vocabulary_logp(model, ids, mask)[0], ids[:, 1:])  # (2P, L - 1)
    batch = pack(cut).to(device)  # only for what it says of the selected tokens
    count = [len(segment.positions) for _, *two in cut for segment in two]
    place = [len(prompt) - 1 + segment.positions for prompt, *two in cut for segment in two]
    where = torch.from_numpy(np.repeat(np.arange(len(count)), count)).to(device)
    found = logp[where, torch.from_numpy(np.concatenate(place)).to(device)]
    return found, batch.ref_logp, batch.cu_rows


def packed(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    alone = [
        (prompt, segment, EMPTY)  # the empty segment has no rows
        for prompt, *two in untruncated(cut, pairs)
        for segment in two
    ]
    batch = pack(alone).to(model.device)
    # every second segment is an empty one: what is left are S segments in the pairs' order
    return every_row(model, batch), batch.ref_logp, batch.cu_rows[0::2].contiguous()


def shared(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    return _found(model, untruncated(cut, pairs), every_row)


def truncated(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    return _found(model, cut, every_row)


def selected(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    return _found(model, cut, selected_rows)


def fused(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    return _found(model, cut, token_logprob)


SAVINGS = (unpacked, packed, shared, truncated, selected, fused)


def _found(model, triples: list[CutPair], logprob: Callable) -> Found:
    batch = pack(triples).to(model.device)
    return logprob(model, batch), batch.ref_logp, batch.cu_rows


def untruncated(cut: list[CutPair], pairs: list[ScoredPair]) -> list[CutPair]:
    """The same selected tokens, with all of both responses read."""
    return [
        (prompt, replace(chosen, response=pair.chosen), replace(rejected, response=pair.rejected))
        for (prompt, chosen, rejected), pair in zip(cut, pairs, strict=True)
    ]


def every_row(model, batch: PackedBatch, gather_first: bool = False) -> Tensor:  # (M,)
    args = hidden_states(model, batch), head(model).weight, batch.rows, batch.targets
    return plain.selected_logprob(*args, gather_first=gather_first)


def selected_rows(model, batch: PackedBatch) -> Tensor:  # (M,)
    return every_row(model, batch, gather_first=True)


def truth(objective: str, weights: Weights, pairs: list[ScoredPair]) -> Truth:
    """One padded response a row, the model's own forward, a dense log-softmax, all in float32."""
    found = unpacked(weights.twin(), segments(objective, pairs), pairs)
    value = loss(objective, *found)
    value.backward()
    return Truth(value.item(), weights.take_gradients())


def names(objectives: tuple[str, ...] = ("simpo", "sepo")) -> list[str]:
    return [f"{objective}: {saving.__name__}" for objective in objectives for saving in SAVINGS]


def contenders(
    weights: Weights,
    rounds: list[list[ScoredPair]],
    *,
    bf16: bool,
    objectives: tuple[str, ...] = ("simpo", "sepo"),
    turns: int | None = None,
) -> list[Contender]:
    own, ours = weights.twin(), prepare_model(weights.twin())
    return [
        _contender(saving, objective, own if saving is unpacked else ours, rounds, bf16, turns)
        for objective in objectives
        for saving in SAVINGS
    ]


def _contender(
    saving: Callable, objective: str, model, rounds: list, bf16: bool, turns: int | None
) -> Contender:
    cuts = [segments(objective, pairs) for pairs in rounds]
    autocast = plain.Autocast(model.device, bf16)

    def step(number: int) -> Tensor:
        with autocast():
            found = saving(model, cuts[number], rounds[number])
        value = loss(objective, *found)
        value.backward()
        return value.detach()

    return Contender(
        f"{objective}: {saving.__name__}", step, objective=objective, ours=True, group="savings",
        work=lambda number: _work(saving, cuts[number], rounds[number], model),
        lower=autocast.lower, rounds=turns,
    )  # fmt: skip


def _work(saving: Callable, cut: list[CutPair], pairs: list[ScoredPair], model) -> work.Work:
    whole = untruncated(cut, pairs)
    triples = whole if saving in (unpacked, packed, shared) else cut
    sizes = [(len(p), len(c.response), len(r.response)) for p, c, r in triples]
    if saving is unpacked:
        tokens = 2 * len(pairs) * max(p + max(c, r) for p, c, r in sizes)
    else:
        tokens = sum((2 if saving is packed else 1) * p + c + r for p, c, r in sizes)
    few = sum(map(num_selected, cut))
    rows = few if saving in (selected, fused) else tokens
    once = saving not in (unpacked, packed)
    return work.Work(tokens, rows, work.training(model, sizes, few, prompt_once=once))
