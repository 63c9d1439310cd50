"""When the two heads' matrix products are done, and what is kept between the two directions.

Counted in matrix products of 2 M D V FLOP, heads of equal width, hidden and weight both trainable:

    save         4  forward keeps two (M, V) blocks; 3 where the head needs no gradient
    partial    4-6  on a GPU: it keeps those of as many rows as fit, the others are recomputed
    recompute    6  forward keeps nothing of that size, backward makes both logits again in chunks
    frozen_head  4  the blocks do not fit and weight and bias need no gradient: forward keeps the
                    two (M, D) directions of dX, of logp and of kl
    no_grad      2  nothing is kept

`budget` bounds the bytes of all (rows, V) blocks alive at once, in either direction, and of the
(rows, columns) buffer of the gradient.
"""

from typing import NamedTuple

import torch

from sepo_kernels import waves
from sepo_kernels.devices import accumulator, row_stride
from sepo_kernels.selected_logprob.schedule import (
    DEFAULT_BUDGET,
    FROZEN_HEAD,
    MEMORY_SHARE,
    NO_GRAD,
    PARTIAL,
    RECOMPUTE,
    SAVE,
    SAVE_MIN_CHUNK,
    even,
)

REF_POLICY, POLICY_REF = "ref||policy", "policy||ref"
DIRECTIONS = (REF_POLICY, POLICY_REF)
# the gradient of the logits is made and multiplied this many columns at a time: with fewer, each
# product reads all of X again for little work; with many more, the buffer leaves the cache. On a GPU
# a tile of the vocabulary for each multiprocessor: dW is then made in whole waves, for any D
MIN_COLUMNS, MAX_COLUMNS = 4096, 16384


class Layout(NamedTuple):
    """What one row costs in (rows, V) blocks."""

    V: int
    dtype: torch.dtype  # of the inputs, of the first kept block and of the logits' gradient
    second: torch.dtype  # of the second kept block
    fused: bool  # the implementation keeps both logits in cache
    multiprocessors: int = 0  # of the GPU; 0: a CPU
    D: int = 1

    @property
    def kept(self) -> int:
        """Bytes of one row that `save` keeps."""
        return self._bytes(self.dtype) + self._bytes(self.second)

    @property
    def scratch(self) -> int:
        """Bytes of one row of logits that no kept block has room for."""
        acc = accumulator(self.dtype)
        wide = (self.dtype != acc) + (self.second != acc)
        return 0 if self.fused else wide * self._bytes(acc)

    @property
    def gradient(self) -> int:
        """Bytes of one row of the narrowest buffer for the gradient of the logits."""
        return min(self.V, MIN_COLUMNS) * self.dtype.itemsize

    @property
    def widest_gradient(self) -> int:
        """And of the widest that a GPU makes use of."""
        return min(self.V, self.most_columns) * self.dtype.itemsize

    @property
    def most_columns(self) -> int:
        if self.multiprocessors == 0:
            return MAX_COLUMNS
        wave = self.multiprocessors * waves.TILE_ROWS
        return -(-MIN_COLUMNS // wave) * wave

    @property
    def working_rows(self) -> int:
        """Rows of a GPU's chunk that are as good as any more."""
        return waves.working_rows(self.multiprocessors, heads=2)

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of blocks alive for each row of a chunk, in a schedule other than `save`."""
        if gradient:
            return self.kept + self.scratch + self.gradient
        if self.fused:  # its sums of column groups take far less than 16 bits an entry
            return self.V // 4
        return 2 * self._bytes(accumulator(self.dtype))

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
    if need_hidden or need_head:
        wanted = M * layout.kept + max(rows * layout.scratch, M * layout.widest_gradient)
    else:
        wanted = rows * layout.row_bytes(gradient=False)
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
    if save_bytes(M, layout) <= budget:
        return SAVE
    if not need_head:
        return FROZEN_HEAD
    saved = saved_rows(M, layout, budget, PARTIAL)
    return (SAVE if saved >= M else PARTIAL) if saved else RECOMPUTE


def save_bytes(M: int, layout: Layout) -> int:
    """The smallest budget of `save`: its forward works in chunks too."""
    return M * layout.kept + max(min(M, SAVE_MIN_CHUNK) * layout.scratch, M * layout.gradient)


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
    rows = min(rows, budget // (layout.kept + layout.gradient))
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
        if backward or layout.scratch == 0:
            return max(1, M)
        row = layout.scratch
    else:
        row = layout.row_bytes(gradient=backward or schedule in (FROZEN_HEAD, PARTIAL))
    limit = max(1, (budget - saved * layout.kept) // row)
    rows = M - saved if backward else M
    if layout.multiprocessors == 0:
        return even(rows, limit)
    return waves.chunk_rows(rows, limit, layout.V, layout.D, layout.multiprocessors, heads=2)


def chunk_columns(
    rows: int,  # of the chunk
    layout: Layout,
    room: int,  # bytes that the budget leaves beside blocks and logits
) -> int:
    """Columns of the buffer for the logits' gradient."""
    most = layout.most_columns
    limit = room // max(1, rows) // layout.dtype.itemsize
    limit = min(max(limit, MIN_COLUMNS), most) // 64 * 64
    if layout.multiprocessors and limit == most:
        return min(layout.V, most)
    return min(layout.V, -(-even(layout.V, limit) // 64) * 64)


class Gradient(NamedTuple):
    """The buffers of the logits' gradient, of which one is alive at a time."""

    rows: int  # of a chunk
    columns: int

    def bytes(self, layout: Layout) -> int:
        return self.rows * self.columns * layout.dtype.itemsize


def saved_gradient(M: int, layout: Layout, budget: int, schedule: str) -> Gradient:
    """Of the rows whose blocks were kept."""
    rows = saved_rows(M, layout, budget, schedule)
    return Gradient(rows, chunk_columns(rows, layout, budget - rows * layout.kept))


def chunk_gradient(M: int, layout: Layout, budget: int, schedule: str) -> Gradient:
    """Of a chunk of rows whose blocks are made where it is."""
    saved = saved_rows(M, layout, budget, schedule)
    rows = chunk_rows(M, layout, budget, schedule, backward=schedule != FROZEN_HEAD)
    rows = min(M - saved, rows)
    room = budget - saved * layout.kept - rows * (layout.kept + layout.scratch)
    return Gradient(rows, chunk_columns(rows, layout, room))


def bytes_alive(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
) -> int:
    """Bytes of all blocks alive at once, the larger of both directions."""
    fwd = min(M, chunk_rows(M, layout, budget, schedule, backward=False))
    scores = fwd * layout.row_bytes(gradient=False)
    if schedule == NO_GRAD:
        return scores
    saved = saved_rows(M, layout, budget, schedule)
    alive = saved_gradient(M, layout, budget, schedule).bytes(layout) if saved else 0
    if schedule == SAVE:
        return M * layout.kept + max(fwd * layout.scratch, alive)
    made = chunk_gradient(M, layout, budget, schedule)
    both = made.rows * (layout.kept + layout.scratch) + made.bytes(layout)
    if schedule == FROZEN_HEAD:
        return both
    return saved * layout.kept + max(alive, both, scores)


def fwd_gemms(schedule: str) -> tuple[int, int]:  # of the policy's width, of the reference's
    return (3 if schedule == FROZEN_HEAD else 1), 1


def bwd_rows(
    M: int,
    saved: int,  # rows that the forward kept
    schedule: str,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[int, int]:
    """Rows that the backward multiplies with the policy's (V, D), and with the reference's."""
    if schedule in (FROZEN_HEAD, NO_GRAD):
        return 0, 0
    again = M - saved
    return M * (need_hidden + need_weight) + again, again
