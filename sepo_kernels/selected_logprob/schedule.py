"""When the head's three matrix products are done, and what is kept between the two directions.

Counted in matrix products of 2 M D V FLOP, hidden and weight both trainable:

    save         3  forward keeps dlogp/dlogits, (M, V) in the input's dtype
    recompute    4  forward keeps nothing of that size, backward makes the logits again in chunks
    frozen_head  2  weight and bias need no gradient: forward keeps the (M, D) direction of dX
    no_grad      1  nothing is kept

`budget` bounds the bytes of all (rows, V) buffers alive at once, in either direction.
"""

from typing import NamedTuple

import torch

from sepo_kernels.platform import accumulator, row_stride

SAVE, RECOMPUTE, FROZEN_HEAD, NO_GRAD = "save", "recompute", "frozen_head", "no_grad"
DEFAULT_BUDGET = 1 << 30  # bytes: M = 10 922 rows of a bfloat16 V = 49 152 head are saved within it
# the forward of `save` works in chunks too; fewer rows than this re-read the weight too often
SAVE_MIN_CHUNK = 256


class Layout(NamedTuple):
    """What one row costs in (rows, V) buffers."""

    V: int
    dtype: torch.dtype  # of the inputs, and of what is kept
    capped: bool
    fused: (
        bool  # the implementation keeps the logits in cache: no buffer in the accumulator's dtype
    )
    gpu: bool = False  # rows are padded to whole cache lines

    @property
    def kept(self) -> int:
        """Bytes of one row that `save` keeps."""
        return row_stride(self.V, self.dtype, self.gpu) * self.dtype.itemsize

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of (1, V) buffers alive for each row of a chunk.

        One accumulator buffer goes from logits to probabilities in place. A gradient adds a copy
        in the input's dtype, where that differs, for the matrix product; a soft cap its derivative.
        """
        if self.fused:  # one float32 sum for each group of 512 columns and, padded, row
            return self.kept if gradient else max(1, self.V // 64)
        acc = accumulator(self.dtype)
        wide = row_stride(self.V, acc, self.gpu) * acc.itemsize
        if not gradient:
            return wide
        return wide + (self.kept if self.kept != wide else 0) + (wide if self.capped else 0)

    @property
    def save_scratch(self) -> int:
        """`row_bytes` of `save` without the row that is kept: zero for a float32 head without cap."""
        return self.row_bytes(gradient=True) - self.kept


def choose(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    need_hidden: bool,
    need_head: bool,  # weight or bias needs a gradient
) -> str:
    if not (need_hidden or need_head):
        return NO_GRAD
    if not need_head:
        return FROZEN_HEAD
    scratch = min(M, SAVE_MIN_CHUNK) * layout.save_scratch
    return SAVE if M * layout.kept + scratch <= budget else RECOMPUTE


def chunk_rows(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
    backward: bool,
) -> int:
    """Rows of one chunk, at least 1; chunks are of equal size but for the last."""
    if schedule == SAVE:
        # the backward of `save` makes no (rows, V) buffer of its own
        if backward or layout.save_scratch == 0:
            return max(1, M)
        limit = (budget - M * layout.kept) // layout.save_scratch
    else:
        limit = budget // layout.row_bytes(gradient=backward or schedule == FROZEN_HEAD)
    return even(M, max(1, limit))


def even(total: int, limit: int) -> int:
    """The size of one part, at least 1, when `total` is cut in as few equal parts as `limit` lets."""
    parts = max(1, -(-total // limit))
    return max(1, -(-total // parts))


def fwd_gemms(schedule: str) -> int:
    return 2 if schedule == FROZEN_HEAD else 1


def bwd_gemms(schedule: str, need_hidden: bool, need_weight: bool) -> int:
    if schedule in (FROZEN_HEAD, NO_GRAD):
        return 0
    return need_hidden + need_weight + (schedule == RECOMPUTE)
