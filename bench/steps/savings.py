"""Where the time goes: the same loss, with each saving switched on after the one before."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench import plain
from bench.contender import Contender
from bench.steps import work
from bench.steps.inputs import Truth
from bench.steps.models import Weights
from bench.steps.objectives import loss, segments
from sepo.cost.work import Schedule
from sepo.data.pack import pack
from sepo.data.segments import num_selected
from sepo.data.types import CutPair, PackedBatch, ScoredPair, Segment
from sepo.model.forward import head, hidden_states, token_logprob
from sepo.model.prepare import prepare_model

# logp (M,), the reference's or None, cu_rows (S + 1,)
Found = tuple[Tensor, Tensor | None, Tensor]
EMPTY = Segment(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))


def untruncated(cut: list[CutPair], pairs: list[ScoredPair]) -> list[CutPair]:
    """The same selected tokens, with all of both responses read."""
    return [
        (prompt, replace(chosen, response=pair.chosen), replace(rejected, response=pair.rejected))
        for (prompt, chosen, rejected), pair in zip(cut, pairs, strict=True)
    ]


def every_row(model, batch: PackedBatch, gather_first: bool = False) -> Tensor:  # (M,)
    args = hidden_states(model, batch), head(model).weight, batch.rows, batch.targets
    return plain.selected_logprob(*args, gather_first=gather_first)


selected_rows = partial(every_row, gather_first=True)


@dataclass(frozen=True)
class Saving:
    name: str
    logprob: Callable | None  # of a packed batch; None: padded, by the model's own forward
    prompt_once: bool = True
    whole: bool = False  # responses are read to their end
    every: bool = True  # logits of every row


SAVINGS = (
    Saving("unpacked", None, prompt_once=False, whole=True),  # one padded response a row
    Saving("packed", every_row, prompt_once=False, whole=True),  # no padding: end to end
    Saving("shared", every_row, whole=True),  # the prompt once for both responses
    Saving("truncated", every_row),  # nothing after the last selected token
    Saving("selected", selected_rows, every=False),  # logits of the selected rows only
    Saving("fused", token_logprob, every=False),  # in one operation that keeps no logits
)
UNPACKED = SAVINGS[0]


def computed(saving: Saving, model, cut: list[CutPair], pairs: list[ScoredPair]) -> Found:
    if saving is UNPACKED:
        return unpacked(model, cut, pairs)
    triples = untruncated(cut, pairs) if saving.whole else cut
    if not saving.prompt_once:  # an empty segment has no rows
        triples = [(prompt, segment, EMPTY) for prompt, *two in triples for segment in two]
    batch = pack(triples).to(model.device)
    # every second segment is then an empty one: what is left are S segments in the pairs' order
    cu_rows = batch.cu_rows if saving.prompt_once else batch.cu_rows[0::2].contiguous()
    return saving.logprob(model, batch), batch.ref_logp, cu_rows


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


def truth(objective: str, weights: Weights, pairs: list[ScoredPair]) -> Truth:
    """One padded response a row, the model's own forward, a dense log-softmax, all in float32."""
    found = unpacked(weights.twin(), segments(objective, pairs), pairs)
    value = loss(objective, *found)
    value.backward()
    return Truth(value.item(), weights.take_gradients())


def names(objectives: tuple[str, ...] = ("simpo", "sepo")) -> list[str]:
    return [f"{objective}: {saving.name}" for objective in objectives for saving in SAVINGS]


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
        _contender(saving, objective, own if saving is UNPACKED else ours, rounds, bf16, turns)
        for objective in objectives
        for saving in SAVINGS
    ]


def _contender(
    saving: Saving, objective: str, model, rounds: list, bf16: bool, turns: int | None
) -> Contender:
    cuts = [segments(objective, pairs) for pairs in rounds]
    step = plain.Step(
        lambda number: computed(saving, model, cuts[number], rounds[number]),
        lambda found: loss(objective, *found), model.device, bf16,
    )  # fmt: skip
    return Contender(
        f"{objective}: {saving.name}", step, objective=objective, ours=True, group="savings",
        work=lambda number: _work(saving, cuts[number], rounds[number], model),
        lower=step.lower, rounds=turns,
    )  # fmt: skip


def _work(saving: Saving, cut: list[CutPair], pairs: list[ScoredPair], model) -> work.Work:
    if saving is UNPACKED:
        return work.padded(model, pairs, used=sum(map(num_selected, cut)))
    triples = untruncated(cut, pairs) if saving.whole else cut
    schedule = Schedule(prompt_once=saving.prompt_once)
    return work.packed(model, triples, schedule, every_row=saving.every)
