"""Where the time goes: the same loss, with each saving switched on after the one before.

unpacked    one padded response a row, the model's own forward, logits of every position
packed      no padding: responses end to end, each after a prompt of its own
shared      the prompt once for both responses
truncated   nothing after the last selected token
selected    logits of the selected rows only
fused       the same rows in one operation that keeps no logits
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.end_to_end import flops
from bench.end_to_end.contender import Contender, Work
from bench.end_to_end.objectives import loss, segments
from bench.end_to_end.weights import Weights
from sepo.data.pack import pack
from sepo.data.segments import num_selected
from sepo.data.types import CutPair, PackedBatch, ScoredPair, Segment, TokenPair
from sepo.model import head, hidden_states, prepare_model, token_logprob

# logp (M,), the reference's or None, cu_rows (S + 1,)
Found = tuple[Tensor, Tensor | None, Tensor]
EMPTY = Segment(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))


def unpacked(model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    device = model.device
    ids, mask = padded(pairs, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (2P, L, V)
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    batch = pack(cut).to(device)  # only for what it says of the selected tokens
    count = [len(segment.positions) for _, *two in cut for segment in two]
    place = [len(prompt) - 1 + segment.positions for prompt, *two in cut for segment in two]
    where = torch.from_numpy(np.repeat(np.arange(len(count)), count)).to(device)
    found = logp[where, torch.from_numpy(np.concatenate(place)).to(device)]
    return found, batch.ref_logp, batch.cu_rows


def padded(
    pairs: list[TokenPair], device: torch.device
) -> tuple[Tensor, Tensor]:  # tokens and attention mask, (2P, L) int64
    """Each response after its prompt, filled up to the longest of all; chosen, rejected, chosen, ..."""
    sequences = [
        np.concatenate([pair.prompt, y]) for pair in pairs for y in (pair.chosen, pair.rejected)
    ]
    longest = max(map(len, sequences))
    ids = np.stack([np.pad(x, (0, longest - len(x))) for x in sequences]).astype(np.int64)
    mask = np.stack([np.arange(longest) < len(x) for x in sequences]).astype(np.int64)
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


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


def every_row(model, batch: PackedBatch) -> Tensor:  # (M,)
    logits = F.linear(hidden_states(model, batch), head(model).weight)  # (N, V)
    return logits.float().log_softmax(-1)[batch.rows, batch.targets]


def selected_rows(model, batch: PackedBatch) -> Tensor:  # (M,)
    logits = F.linear(hidden_states(model, batch)[batch.rows], head(model).weight)  # (M, V)
    return logits.float().log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]


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
    plain, ours = weights.twin(), prepare_model(weights.twin())
    found = [
        _contender(saving, objective, plain if saving is unpacked else ours, rounds, bf16)
        for objective in objectives
        for saving in SAVINGS
    ]
    return [replace(contender, turns=turns) for contender in found]


def _contender(saving: Callable, objective: str, model, rounds: list, bf16: bool) -> Contender:
    cuts = [segments(objective, pairs) for pairs in rounds]
    state = {"autocast": nullcontext}

    def step(number: int) -> Tensor:
        with state["autocast"]():
            found = saving(model, cuts[number], rounds[number])
        value = loss(objective, *found)
        value.backward()
        return value.detach()

    def lower() -> None:
        if bf16:
            state["autocast"] = partial(torch.autocast, model.device.type, torch.bfloat16)

    return Contender(
        name=f"{objective}: {saving.__name__}",
        group="savings",
        objective=objective,
        step=step,
        work=lambda number: _work(saving, cuts[number], rounds[number], model),
        lower=lower,
    )


def _work(saving: Callable, cut: list[CutPair], pairs: list[ScoredPair], model) -> Work:
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
    return Work(tokens, rows, flops.training(model, sizes, few, prompt_once=once))
