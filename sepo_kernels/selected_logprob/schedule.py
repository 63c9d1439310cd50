"""When the head's three matrix products are done, and what is kept between the two directions.

Counted in matrix products of 2 M D V FLOP, hidden and weight both trainable:

    save         3  forward keeps dlogp/dlogits, (M, V) in the input's dtype
    partial    3-4  on a GPU: it keeps that for as many rows as fit, the others are recomputed
    recompute    4  forward keeps nothing of that size, backward makes the logits again in chunks
    frozen_head  2  weight and bias need no gradient: forward keeps the (M, D) direction of dX
    no_grad      1  nothing is kept

`budget` bounds the bytes of all (rows, V) buffers alive at once, in either direction.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sepo_kernels import waves
from sepo_kernels.devices import accumulator, row_stride

SAVE, PARTIAL, RECOMPUTE = "save", "partial", "recompute"
FROZEN_HEAD, NO_GRAD = "frozen_head", "no_grad"
# bytes, on a CPU: M = 10 922 rows of a bfloat16 V = 49 152 head are saved within it
DEFAULT_BUDGET = 1 << 30
# of a GPU's memory that the default takes at most. A training run fills about half of it with
# weights, gradients and the optimiser's state, before or after its first step; this is a quarter of
# the rest. Not of what is free at the moment: that differs between the first step and the second,
# and between a run and its resumption, which must cut the same chunks to round alike
MEMORY_SHARE = 8
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
    multiprocessors: int = 0  # of the GPU; 0: a CPU
    D: int = 1

    @property
    def kept(self) -> int:
        """Bytes of one row that `save` keeps."""
        return self._bytes(self.dtype)

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of (1, V) buffers alive for each row of a chunk.

        One accumulator buffer goes from logits to probabilities in place. A gradient adds a copy
        in the input's dtype, where that differs, for the matrix product; a soft cap its derivative.
        """
        if self.fused:  # one float32 sum for each group of 512 columns and, padded, row
            return self.kept if gradient else max(1, self.V // 64)
        acc = accumulator(self.dtype)
        wide = self._bytes(acc)
        if not gradient:
            return wide
        return wide + (self.kept if self.dtype != acc else 0) + (wide if self.capped else 0)

    @property
    def save_scratch(self) -> int:
        """`row_bytes` of `save` without the row that is kept: zero for a float32 head without cap."""
        return self.row_bytes(gradient=True) - self.kept

    @property
    def working_rows(self) -> int:
        """Rows of a GPU's chunk that are as good as any more."""
        return waves.working_rows(self.multiprocessors, heads=1)

    def _bytes(self, dtype: torch.dtype) -> int:
        return row_stride(self.V, dtype, self.multiprocessors > 0) * dtype.itemsize


def default_budget(
    M: int,
    layout: Layout,
    memory: int,  # bytes of the GPU, all of them; unread on a CPU
    need_hidden: bool,
    need_head: bool,
) -> int:
    """What `save` takes, but at most a share of the GPU's memory; the same whatever is free."""
    if layout.multiprocessors == 0:
        return DEFAULT_BUDGET
    rows = max(1, min(M, layout.working_rows))
    if need_head:
        wanted = M * layout.kept + rows * layout.save_scratch
    else:
        wanted = rows * layout.row_bytes(gradient=need_hidden)
    return min(max(wanted, layout.row_bytes(gradient=True)), memory // MEMORY_SHARE)


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
    if save_bytes(M, layout) <= budget:
        return SAVE
    saved = saved_rows(M, layout, budget, PARTIAL)
    return (SAVE if saved >= M else PARTIAL) if saved else RECOMPUTE


def save_bytes(M: int, layout: Layout) -> int:
    """The smallest budget of `save`: its forward works in chunks too."""
    return M * layout.kept + min(M, SAVE_MIN_CHUNK) * layout.save_scratch


def saved_rows(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
) -> int:
    """How many rows, the first, are kept for the backward."""
    if schedule == SAVE:
        return M
    if schedule != PARTIAL or layout.multiprocessors == 0:
        return 0
    # the others need a chunk to work in: a worthwhile one, but at most three quarters of the budget
    row = layout.row_bytes(gradient=True)
    working = max(1, min(waves.ADDING_ROWS, budget * 3 // 4 // row))
    rows = (budget - working * row) // layout.kept
    return min(M, rows // waves.TILE_ROWS * waves.TILE_ROWS)


def chunk_rows(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
    backward: bool,
) -> int:
    """Rows of one chunk, at least 1: of those recomputed, where the others are saved.

    Chunks are of equal size but for the last; on a GPU of whole waves.
    """
    saved = saved_rows(M, layout, budget, schedule)
    if schedule == SAVE:
        # the backward of `save` makes no (rows, V) buffer of its own
        if backward or layout.save_scratch == 0:
            return max(1, M)
        row = layout.save_scratch
    else:
        gradient = backward or schedule in (FROZEN_HEAD, PARTIAL)
        row = layout.row_bytes(gradient)
    limit = max(1, (budget - saved * layout.kept) // row)
    rows = M - saved if backward else M
    if layout.multiprocessors == 0:
        return even(rows, limit)
    return waves.chunk_rows(rows, limit, layout.V, layout.D, layout.multiprocessors, heads=1)


def even(total: int, limit: int) -> int:
    """The size of one part, at least 1, when `total` is cut in as few equal parts as `limit` lets."""
    parts = max(1, -(-total // limit))
    return max(1, -(-total // parts))


def parts(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def bytes_alive(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
) -> int:
    """Bytes of all (rows, V) buffers alive at once, the larger of both directions."""
    fwd, bwd = (chunk_rows(M, layout, budget, schedule, back) for back in (False, True))
    if schedule == SAVE:
        return M * layout.kept + min(fwd, M) * layout.save_scratch
    if schedule in (FROZEN_HEAD, NO_GRAD):
        return fwd * layout.row_bytes(gradient=schedule == FROZEN_HEAD)
    saved = saved_rows(M, layout, budget, schedule)
    scores = fwd * max(layout.row_bytes(gradient=False), layout.save_scratch if saved else 0)
    return saved * layout.kept + max(bwd * layout.row_bytes(gradient=True), scores)


def fwd_gemms(schedule: str) -> int:
    return 2 if schedule == FROZEN_HEAD else 1


def bwd_rows(
    M: int,
    saved: int,  # rows that the forward kept
    schedule: str,
    need_hidden: bool,
    need_weight: bool,
) -> int:
    """Rows that the backward multiplies with a (V, D), all its products together."""
    if schedule in (FROZEN_HEAD, NO_GRAD):
        return 0
    return M * (need_hidden + need_weight) + M - saved
