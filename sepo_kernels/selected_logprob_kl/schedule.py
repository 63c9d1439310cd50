"""When the two heads' matrix products are done, and what is kept between the two directions.

Counted in matrix products of 2 M D V FLOP, heads of equal width, hidden and weight both trainable:

    save         4  forward keeps two (M, V) blocks; 3 where the head needs no gradient
    recompute    6  forward keeps nothing of that size, backward makes both logits again in chunks
    frozen_head  4  the blocks do not fit and weight and bias need no gradient: forward keeps the
                    two (M, D) directions of dX, of logp and of kl
    no_grad      2  nothing is kept

`budget` bounds the bytes of all (rows, V) blocks alive at once, in either direction, and of the
(rows, columns) buffer of the gradient.
"""

from typing import NamedTuple

import torch

from sepo_kernels.platform import accumulator, row_stride
from sepo_kernels.selected_logprob.schedule import (
    FROZEN_HEAD,
    NO_GRAD,
    RECOMPUTE,
    SAVE,
    SAVE_MIN_CHUNK,
    even,
)

REF_POLICY, POLICY_REF = "ref||policy", "policy||ref"
DIRECTIONS = (REF_POLICY, POLICY_REF)
# the gradient of the logits is made and multiplied this many columns at a time: with fewer, each
# product reads all of X again for little work; with many more, the buffer leaves the cache
MIN_COLUMNS, MAX_COLUMNS = 4096, 16384


class Layout(NamedTuple):
    """What one row costs in (rows, V) blocks."""

    V: int
    dtype: torch.dtype  # of the inputs, of the first kept block and of the logits' gradient
    second: torch.dtype  # of the second kept block
    fused: bool  # the implementation keeps both logits in cache
    gpu: bool = False  # rows are padded to whole cache lines

    def _bytes(self, dtype: torch.dtype) -> int:
        return row_stride(self.V, dtype, self.gpu) * dtype.itemsize

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

    def row_bytes(self, gradient: bool) -> int:
        """Bytes of blocks alive for each row of a chunk, in a schedule other than `save`."""
        if gradient:
            return self.kept + self.scratch + self.gradient
        if self.fused:  # its sums of column groups take far less than 16 bits an entry
            return self.V // 4
        return 2 * self._bytes(accumulator(self.dtype))


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
    return RECOMPUTE if need_head else FROZEN_HEAD


def save_bytes(M: int, layout: Layout) -> int:
    """The smallest budget of `save`: its forward works in chunks too."""
    return M * layout.kept + max(min(M, SAVE_MIN_CHUNK) * layout.scratch, M * layout.gradient)


def chunk_rows(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
    backward: bool,
) -> int:
    """Rows of one chunk, at least 1; chunks are of equal size but for the last."""
    if schedule == SAVE:
        if backward or layout.scratch == 0:
            return max(1, M)
        limit = (budget - M * layout.kept) // layout.scratch
    else:
        limit = budget // layout.row_bytes(gradient=backward or schedule == FROZEN_HEAD)
    return even(M, max(1, limit))


def chunk_columns(
    rows: int,  # of the chunk
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
) -> int:
    """Columns of the buffer for the logits' gradient, from what `budget` leaves."""
    beside = layout.kept + (0 if schedule == SAVE else layout.scratch)
    limit = (budget // max(1, rows) - beside) // layout.dtype.itemsize
    limit = min(max(limit, MIN_COLUMNS), MAX_COLUMNS) // 64 * 64
    return min(layout.V, -(-even(layout.V, limit) // 64) * 64)


def bytes_alive(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
) -> int:
    """Bytes of all blocks alive at once, the larger of both directions."""
    fwd, bwd = (min(M, chunk_rows(M, layout, budget, schedule, back)) for back in (False, True))
    scores = fwd * layout.row_bytes(gradient=False)
    if schedule == NO_GRAD:
        return scores
    rows = fwd if schedule == FROZEN_HEAD else bwd
    gradient = rows * chunk_columns(rows, layout, budget, schedule) * layout.dtype.itemsize
    if schedule == SAVE:
        return M * layout.kept + max(fwd * layout.scratch, gradient)
    both = rows * (layout.kept + layout.scratch) + gradient
    return max(both, scores) if schedule == RECOMPUTE else both


def fwd_gemms(schedule: str) -> tuple[int, int]:  # of the policy's width, of the reference's
    return (3 if schedule == FROZEN_HEAD else 1), 1


def bwd_gemms(schedule: str, need_hidden: bool, need_weight: bool) -> tuple[int, int]:
    if schedule in (FROZEN_HEAD, NO_GRAD):
        return 0, 0
    again = schedule == RECOMPUTE
    return need_hidden + need_weight + again, int(again)
