"""Attention of one layer: forward and backward over the prompts and both responses of all pairs."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench import precision
from bench.operations import Case, Inputs, seeded
from bench.plain import stacked
from bench.precision import product
from bench.steps.pairs import drawn_pairs
from sepo.cost.work import OURS, needed_size
from sepo.data import all_positions, pack, truncate

NAMES = ("out", "grad_query", "grad_key", "grad_value")


@dataclass(frozen=True)
class AttentionCase(Case):
    suite: ClassVar[str] = "attention"
    name: str
    pairs: int = 8
    max_length: int = 512  # tokens of a prompt and one response
    heads: int = 9
    groups: int = 3  # heads of keys and values
    width: int = 64
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, device: str) -> "AttentionInputs":
        return AttentionInputs(self, device)


class AttentionInputs(Inputs):
    """One packed batch of drawn lengths, and the same rows as padded sequences."""

    def __init__(self, case: AttentionCase, device: str):
        super().__init__(case, device)
        self.batch = _batch(case).to(device)
        N, E = len(self.batch.tokens), case.width
        g = seeded(device)
        draw = lambda *shape: torch.randn(*shape, generator=g, device=device).to(case.dtype)
        self.query = draw(1, case.heads, N, E)
        self.key, self.value = draw(1, case.groups, N, E), draw(1, case.groups, N, E)
        self.upstream = draw(1, N, case.heads, E)
        self.layouts: dict[str, object] = {}  # by implementation: a batch has one for all layers

    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (self.query, self.key, self.value)]

    @property
    def gradient_bytes(self) -> int:
        return self.query.nbytes + self.key.nbytes + self.value.nbytes

    @property
    def flop(self) -> float:
        """Two products forward and four backward over what is seen; scores made again are not work."""
        sizes = np.diff(self.batch.spans)  # (P, 3) tokens of prompt, chosen, rejected
        return 6 * 2.0 * self.case.heads * self.case.width * needed_size(sizes, OURS).pairs

    @property
    def bytes(self) -> float:
        """Queries, keys, values, outputs and a gradient for each, the prompt once."""
        return 2 * (self.gradient_bytes + self.upstream.nbytes)

    def result(self, out: Tensor, leaves: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(out, leaves, upstream)
        return dict(zip(NAMES, (out.detach(), *grads), strict=True))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:  # rows (2P, L) int64, which of them are tokens
        sequences = []
        for start, prefix, middle, end in self.batch.spans:
            sequences += [np.r_[start:middle], np.r_[start:prefix, middle:end]]
        rows, real = stacked(sequences)
        return rows.to(self.device), real.to(self.device)

    @cached_property
    def owned(self) -> Tensor:  # (2P, L): the copy whose output counts; a prompt's is the chosen's
        rows, real = self.places
        owned = real.clone()
        for pair, (start, prefix, _, _) in enumerate(self.batch.spans):
            owned[2 * pair + 1, : prefix - start] = False
        return owned

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value (2P, heads, L, E) and the output's gradient (2P, L, H, E)."""
        rows, real = self.places
        found = []
        for x in (self.query, self.key, self.value):
            sequences = x[0].transpose(0, 1)[rows] * real[..., None, None]  # (2P, L, heads, E)
            found.append(sequences.transpose(1, 2).contiguous())
        return *found, self.upstream[0][rows] * self.owned[..., None, None]

    def padded_leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in self.padded[:3]]

    def _unpad(self, result: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the packed rows have it: a prompt's gradient is the sum of both copies'."""
        rows, real = self.places
        N, found = len(self.batch.tokens), {}
        for name in NAMES:
            values = result[name] if name == "out" else result[name].transpose(1, 2)
            used = self.owned if name == "out" else real
            total = values.new_zeros(N, *values.shape[2:], dtype=torch.float64)
            total.index_add_(0, rows[used], values[used].double())
            found[name] = total[None] if name == "out" else total.transpose(0, 1)[None]
        return found

    def definition(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """One softmax a query over the keys it may see; a response and a head of keys at a time.

        All at once would hold a square of the longest response for every head, several times.
        """
        query, key, value = (x[0].to(dtype) for x in (self.query, self.key, self.value))
        upstream = self.upstream[0].transpose(0, 1).to(dtype)  # (H, N, E)
        out, grads = torch.empty_like(query), [torch.zeros_like(x) for x in (query, key, value)]
        repeats = len(query) // len(key)
        for start, prefix, middle, end in self.batch.spans:
            for first, last in ((start, middle), (middle, end)):
                rows = torch.arange(first, last, device=self.device)
                prompt = torch.arange(start, prefix if first > start else start, device=self.device)
                seen = torch.cat([prompt, rows])
                for h in range(len(key)):
                    own, heads = slice(first, last), slice(h * repeats, (h + 1) * repeats)
                    pieces = query[heads, own], key[h : h + 1, seen], value[h : h + 1, seen]
                    leaves = [x.detach().requires_grad_() for x in pieces]
                    part = _softmax(*leaves)
                    found = torch.autograd.grad(part, leaves, upstream[heads, own])
                    out[heads, own], grads[0][heads, own] = part.detach(), found[0]
                    for total, more in zip(grads[1:], found[1:], strict=True):
                        total[h].index_add_(0, seen, more[0])
        values = out.transpose(0, 1), *grads
        return {name: x[None] for name, x in zip(NAMES, values, strict=True)}

    @cached_property
    def _truth(self) -> dict[str, Tensor]:
        return self.definition(torch.float64)

    def due(self, objective: str) -> tuple[str, ...]:
        """What a provider must give to be gated."""
        return NAMES

    def errors(self, result: dict[str, Tensor], objective: str) -> dict[str, float]:
        """Largest error over the largest entry; `objective` "padded" comes as padded sequences."""
        result = self._unpad(result) if objective == "padded" else result
        return {name: precision.relative_error(result[name], self._truth[name]) for name in NAMES}

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        """The largest errors that are given a speed: the output's too is relative."""
        return precision.limits(self.baselines["plain"], ours, self.case.dtype)

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        return {"plain": self.errors(self.definition(self.case.dtype), "weighted")}


def _batch(case: AttentionCase):
    """All responses whole; which token ids they have is nothing to the attention."""
    whole = lambda response: truncate(response, all_positions(len(response)))
    pairs = drawn_pairs(case.pairs, 2, case.max_length)
    return pack([(p.prompt, whole(p.chosen), whole(p.rejected)) for p in pairs])


def _softmax(
    query: Tensor,  # (H, L, E)
    key: Tensor,  # (H_kv, keys, E), the last of them the last query's own
    value: Tensor,  # (H_kv, keys, E)
) -> Tensor:  # (H, L, E)
    repeats = len(query) // len(key)
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    logits = product(query, key.transpose(1, 2)) * query.shape[-1] ** -0.5
    L, keys = logits.shape[1:]
    seen = torch.ones(L, keys, dtype=torch.bool, device=logits.device).tril(keys - L)
    return product(logits.masked_fill(~seen, -torch.inf).softmax(-1), value)


def cases(device: str) -> list[AttentionCase]:
    found = [
        AttentionCase("attention-bf16-8"),
        AttentionCase("attention-fp32-8", dtype=torch.float32, long=True),
    ]
    if device == "cpu":
        return found
    llama = dict(pairs=16, max_length=2048, heads=32, groups=8, width=128)
    return found + [
        AttentionCase("attention-large-16", **llama),
        AttentionCase(
            "attention-large-long-8", **llama | dict(pairs=8, max_length=8192), long=True
        ),
    ]
