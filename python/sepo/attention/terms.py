"""Describe what one layer asks of the attention, and what an implementation is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Span = tuple[int, int, int, int]  # start, prefix_end, rejected_start, pair_end: rows of the buffer
# query (1, H, N, E), key (1, H_kv, N, E), value (1, H_kv, N, E_v), scale of the products
# -> (1, N, H, E_v)
Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
Arrays = Mapping[str, Tensor]  # what `AttentionImpl.arrays` made, on the device
ArraysKey = tuple[str, int | None]  # the implementation, and the window if it tells apart


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything that a choice of implementation depends on; equal for most layers of a model."""

    device: torch.device
    dtype: torch.dtype
    width: int  # E, of a query or key head
    value_width: int  # E_v
    gradient: bool  # a backward pass will follow
    dropout: float = 0.0
    window: int | None = None  # keys a query sees, itself included; None: all of them
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)


@dataclass(frozen=True, slots=True)
class AttentionImpl:
    """One implementation: `build` makes what one batch needs, once, before the first layer.

    What it needs of the batch on the device are `arrays`, made from plain integers: beforehand,
    with the batch, or by the first layer that asks.
    """

    name: str
    absent: Callable[[], str | None]  # why this machine lacks it, whatever the tensors
    why_not: Callable[[Terms], str | None]  # None: serves these terms exactly; else the reason
    build: Callable[[tuple[Span, ...], Terms, Arrays], Attend]
    worth_it: Callable[[Terms], bool] = lambda terms: True  # "auto" considers it
    arrays: Callable[[tuple[Span, ...], int | None], dict[str, np.ndarray]] = lambda spans, window: {}
    by_window: bool = False  # whether arrays differ from window to window
    detail: Callable[[Terms], str] = lambda terms: ""  # for explain: what of it runs here

    def key(self, terms: Terms) -> ArraysKey:
        """Layers whose terms have equal keys share their arrays."""
        return self.name, terms.window if self.by_window else None
