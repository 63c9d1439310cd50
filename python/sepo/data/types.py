"""The values that cross a stage boundary. Positions are 0-based indices into one response."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sepo.data.hidden import HiddenRows
from sepo.data.move import follow, laid_out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenPair:
    """One tokenised preference pair. A response includes its end-of-turn token, if it has one."""

    id: str  # names the row in every message: the data's own id, else its number
    prompt: np.ndarray  # (T0,) int32 token ids, T0 >= 1
    chosen: np.ndarray  # (T1,) int32, T1 >= 1
    rejected: np.ndarray  # (T2,) int32, T2 >= 1
    chosen_weight: np.ndarray | None = None  # (T1,) float32 >= 0, the user's own mask or weights
    rejected_weight: np.ndarray | None = None  # (T2,) float32 >= 0

    def __len__(self) -> int:
        """Tokens of the pair with the prompt stored once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    def __eq__(self, other: object) -> bool:
        """Compare kind, id and all numbers; of hidden rows, which lie on the disk, their count."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, HiddenRows) and isinstance(b, HiddenRows):
        return len(a) == len(b)
    return type(a) is type(b) and a == b


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredPair(TokenPair):
    """A pair with what the scorer wrote of it: scores, and what it kept of the reference."""

    chosen_score: np.ndarray | None = None  # (T1,) float32, log p_oracle - log p_ref in nats
    rejected_score: np.ndarray | None = None  # (T2,) float32
    chosen_ref_logp: np.ndarray | None = None  # (T1,) float32, log p_ref in nats
    rejected_ref_logp: np.ndarray | None = None  # (T2,) float32
    chosen_ref_hidden: HiddenRows | None = None  # T1 rows: row t is the state that predicts t
    rejected_ref_hidden: HiddenRows | None = None  # T2 rows


@dataclass(frozen=True, slots=True)
class Segment:
    """One truncated response: what the model must read and which tokens the loss uses."""

    response: np.ndarray  # (L,) int32 response tokens to read after the prompt, may be empty
    positions: np.ndarray  # (K,) int32 selected response positions, ascending
    targets: np.ndarray  # (K,) int64 their token ids
    weights: np.ndarray | None = None  # (K,) float32, None: all ones
    ref_logp: np.ndarray | None = None  # (K,) float32, None: no cached reference
    ref_hidden: HiddenRows | None = None  # of the whole response; `positions` says which are read
    mask: np.ndarray | None = None  # (K,) float32, drawn at random; None: no such mask


class CutPair(NamedTuple):
    """One pair as a step reads it: each response cut after its last used token."""

    prompt: np.ndarray  # (T0,) int32
    chosen: Segment
    rejected: Segment

    @property
    def responses(self) -> tuple[Segment, ...]:
        return self[1:]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch on the device. The only place that knows which row predicts which token."""

    tokens: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, restart for every pair
    prefix_end: Tensor  # (P,) int32 buffer index one past each pair's shared prompt
    rejected_start: Tensor  # (P,) int32 buffer index of each pair's first rejected token
    pair_end: Tensor  # (P,) int32
    rows: Tensor  # (M,) int32 row of `tokens` whose state predicts the target; may repeat
    targets: Tensor  # (M,) int64
    cu_rows: Tensor  # (S + 1,) int32; segment 2p is pair p's chosen, 2p + 1 its rejected
    weights: Tensor  # (M,) float32, ones unless the user brought weights
    ref_logp: Tensor | None  # (M,) float32, the cached reference, if every segment has one
    ref_hidden: Tensor | None  # (M, D_ref) bfloat16, its states that predict the targets, likewise
    mask: Tensor | None  # (M,) float32, SparsePO's random mask, if every segment has one
    spans: tuple[tuple[int, int, int, int], ...]  # P x (start, prefix_end, rejected_start,
    # pair_end) once more as plain integers: attention slices by them without asking the device

    # what attention reads of it, by implementation and window: `sepo.attention.with_arrays`
    attention: Mapping[tuple, Mapping[str, Tensor]] = field(default_factory=dict)
    pinned: Tensor | None = None  # (bytes,) uint8 in which all of it lies but ref_hidden

    @property
    def num_pairs(self) -> int:
        return len(self.spans)

    def pin(self) -> "PackedBatch":
        """The batch in pinned memory: one buffer, and ref_hidden, which is large, in its own."""
        return self._and_buffer()[0]

    def to(self, device: str | torch.device) -> "PackedBatch":
        """The batch on a device; from the CPU to a GPU in one copy, and one of ref_hidden."""
        device, here = torch.device(device), self.tokens.device
        if device == here:
            return self
        move = lambda tensor: tensor.to(device, non_blocking=True)
        if here.type != "cpu":
            return self._with({name: move(t) for name, t in self._tensors().items()})
        batch, buffer = self._and_buffer()
        tensors = batch._tensors()
        hidden = {name: move(tensors.pop(name)) for name in (HIDDEN,) if name in tensors}
        return batch._with(follow(tensors, buffer, device) | hidden)

    def _and_buffer(self) -> tuple["PackedBatch", Tensor]:
        """The batch in pinned memory, and the buffer in which it lies."""
        if self.pinned is not None:
            return self, self.pinned
        tensors = self._tensors()
        hidden = {name: tensors.pop(name) for name in (HIDDEN,) if name in tensors}
        if hidden:
            _, hidden = laid_out(hidden, pinned=True)
        buffer, tensors = laid_out(tensors, pinned=True)
        return replace(self._with(tensors | hidden), pinned=buffer), buffer

    def _tensors(self) -> dict[tuple, Tensor]:
        """All that are values of the batch, by field, or by key and name in `attention`."""
        own = {(f.name,): getattr(self, f.name) for f in fields(self) if f.name != "pinned"}
        arrays = {
            (key, name): t for key, part in self.attention.items() for name, t in part.items()
        }
        return {name: t for name, t in (own | arrays).items() if isinstance(t, Tensor)}

    def _with(self, tensors: dict[tuple, Tensor]) -> "PackedBatch":
        attention = {
            key: {name: tensors[key, name] for name in part} for key, part in self.attention.items()
        }
        own: dict[str, Any] = {name[0]: t for name, t in tensors.items() if len(name) == 1}
        return replace(self, **own, attention=attention, pinned=None)


HIDDEN = ("ref_hidden",)
