"""When the heads' GEMMs run, and what is saved between the two directions.

Counted in GEMMs of 2 M D V FLOP, for one head and two of equal width, hidden and weight trained:

    save         3    4    forward saves (M, V) blocks, one a head
    partial    3-4  4-6    on a GPU: it saves those of as many rows as fit, and recomputes the rest
    recompute    4    6    forward saves nothing of that size, backward recomputes logits in chunks
    frozen_head  2    4    weight and bias need no gradient: forward saves (M, D) directions of dX
    no_grad      1    2    nothing is saved

Of two heads a frozen one takes `save`, with 3 GEMMs, where the blocks fit.

`budget` bounds the bytes of all (rows, V) buffers alive at once, in either direction. The functions
ask a head's Layout for sizes alone, so a head with other buffers needs another Layout, not another
schedule.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from sepo_kernels import waves

SAVE, PARTIAL, RECOMPUTE = "save", "partial", "recompute"
FROZEN_HEAD, NO_GRAD = "frozen_head", "no_grad"
# bytes, on a CPU: M = 10 922 rows of a bfloat16 V = 49 152 head are saved within it
DEFAULT_BUDGET = 1 << 30
# the default takes at most this part of a GPU's memory. A training run fills about half of it with
# weights, gradients and the optimiser's state, before or after its first step; an eighth is a
# quarter of the rest. The memory that is free now does not count: it differs between the first
# step and the second, and between a run and its resumption, which must cut the same chunks to round
# alike
MEMORY_SHARE = 8
# the forward of `save` works in chunks too; fewer rows than this read the weight too often
SAVE_MIN_CHUNK = 256


class Layout(Protocol):
    """Sizes of one row in the (rows, V) buffers of an operation. Bytes are of one row."""

    @property
    def heads(self) -> int: ...
    @property
    def V(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...  # of the inputs
    @property
    def fused(self) -> bool: ...  # the logits stay in cache
    @property
    def multiprocessors(self) -> int: ...  # of the GPU; 0: a CPU
    @property
    def saved_bytes(self) -> int: ...  # that `save` saves
    @property
    def scratch_bytes(self) -> int: ...  # that the forward of `save` needs beside them
    @property
    def gradient_bytes(self) -> int: ...  # of the narrowest buffer for the logits' gradient
    @property
    def widest_gradient_bytes(self) -> int: ...  # of the widest that a GPU makes use of
    @property
    def frozen_head_first(self) -> bool: ...  # it takes no more GEMMs than `save`
    @property
    def has_frozen_head(self) -> bool: ...  # else a frozen head is saved or recomputed as any

    def row_bytes(self, gradient: bool) -> int: ...  # in a chunk of another schedule than `save`
    def saved_text(self, M: int) -> str: ...  # the blocks that `save` saves, and the verb "take"
    def peak_bytes(self, M: int, budget: int, schedule: str) -> int: ...

    # one number a head: GEMMs of all M rows in the forward; rows of all GEMMs in the backward
    def fwd_gemms(self, schedule: str) -> tuple[int, ...]: ...
    def bwd_rows(
        self, M: int, num_saved: int, schedule: str, need_hidden: bool, need_weight: bool
    ) -> tuple[int, ...]: ...


def working_rows(layout: Layout) -> int:
    """Return the rows of a GPU's chunk that are as good as any more."""
    return waves.working_rows(layout.multiprocessors, layout.heads)


def default_budget(
    M: int,
    layout: Layout,
    memory: int,  # bytes of the GPU, all of them; unread on a CPU
    need_hidden: bool,
    need_head: bool,
) -> int:
    """Return the bytes that `save` takes, but at most a share of the GPU's memory."""
    if layout.multiprocessors == 0:
        return DEFAULT_BUDGET
    rows = max(1, min(M, working_rows(layout)))
    if need_head or (need_hidden and not layout.frozen_head_first):
        beside = max(rows * layout.scratch_bytes, M * layout.widest_gradient_bytes)
        wanted = M * layout.saved_bytes + beside
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
    """Return the schedule with the fewest GEMMs within the budget."""
    if not (need_hidden or need_head):
        return NO_GRAD
    if not need_head and layout.frozen_head_first:
        return FROZEN_HEAD
    if save_bytes(M, layout) <= budget:
        return SAVE
    if not need_head and layout.has_frozen_head:
        return FROZEN_HEAD
    num_saved = saved_rows(M, layout, budget, PARTIAL)
    return (SAVE if num_saved >= M else PARTIAL) if num_saved else RECOMPUTE


def reasons(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
    need_hidden: bool,
    need_head: bool,
) -> tuple[str, ...]:
    """Return why `choose` took this schedule, one sentence each."""
    frozen = "the head needs no gradient"
    too_large = f"saving takes {save_bytes(M, layout)} bytes, budget {budget}:"
    recomputed = M - saved_rows(M, layout, budget, schedule)
    first = {
        SAVE: f"{layout.saved_text(M)} {M * layout.saved_bytes} bytes, budget {budget}",
        PARTIAL: f"{too_large} the logits of {recomputed} of {M} rows are computed twice",
        RECOMPUTE: f"{too_large} the logits are computed twice",
        FROZEN_HEAD: frozen
        if layout.frozen_head_first
        else f"{too_large} both directions of grad_hidden are saved",
        NO_GRAD: "nothing needs a gradient, or no_grad",
    }[schedule]
    more = []
    if need_hidden and not need_head and first != frozen:
        more.append(frozen)
    if need_head and not need_hidden:
        more.append("hidden needs no gradient: its GEMM is left out")
    return first, *more


def save_bytes(M: int, layout: Layout) -> int:
    """Return the smallest budget of `save`: its forward works in chunks too."""
    scratch = min(M, SAVE_MIN_CHUNK) * layout.scratch_bytes
    return M * layout.saved_bytes + max(scratch, M * layout.gradient_bytes)


def saved_rows(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
) -> int:
    """Return how many rows, the first, are saved for the backward."""
    if schedule == SAVE:
        return M
    if schedule != PARTIAL or layout.multiprocessors == 0:
        return 0
    # the others need a chunk to work in: a worthwhile one, but at most three quarters of the budget
    row = layout.row_bytes(gradient=True)
    working = max(1, min(waves.ADDING_ROWS, budget * 3 // 4 // row))
    rows = (budget - working * row) // layout.saved_bytes
    rows = min(rows, budget // (layout.saved_bytes + layout.gradient_bytes))
    return min(M, rows // waves.TILE_ROWS * waves.TILE_ROWS)


def chunk_rows(
    M: int,
    layout: Layout,
    budget: int,  # bytes
    schedule: str,
    backward: bool,
) -> int:
    """Return the rows of one chunk, at least 1: of those recomputed, where the others are saved.

    Chunks are of equal size but for the last; on a GPU of whole waves.
    """
    num_saved = saved_rows(M, layout, budget, schedule)
    if schedule == SAVE:
        # the backward of `save` allocates no (rows, V) scratch
        if backward or layout.scratch_bytes == 0:
            return max(1, M)
        row = layout.scratch_bytes
    else:
        row = layout.row_bytes(gradient=backward or schedule in (FROZEN_HEAD, PARTIAL))
    limit = max(1, (budget - num_saved * layout.saved_bytes) // row)
    rows = M - num_saved if backward else M
    if layout.multiprocessors == 0:
        return even(rows, limit)
    return waves.chunk_rows(
        rows, limit, layout.V, layout.D, layout.multiprocessors, heads=layout.heads
    )


def even(total: int, limit: int) -> int:
    """Return the size of one part, at least 1, of as few equal parts of `total` as `limit` lets."""
    count = max(1, -(-total // limit))
    return max(1, -(-total // count))


def parts(start: int, stop: int, step: int) -> Iterator[slice]:
    """Cut [start, stop) into slices of `step`, but for the last."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
