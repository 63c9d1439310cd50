"""The four values that cross a stage boundary. Positions are 0-based indices into one response."""

from dataclasses import dataclass, fields, replace

import numpy as np
from torch import Tensor

from sepo.data.hidden import HiddenRows


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
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

    @property
    def num_pairs(self) -> int:
        return len(self.spans)

    def to(self, device) -> "PackedBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {
            k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)
