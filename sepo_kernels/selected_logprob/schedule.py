"""When the head's three matrix products are done, and what is kept between the two directions.

Counted in matrix products of 2 M D V FLOP, hidden and weight both trainable:

    save         3  forward keeps dlogp/dlogits, (M, V) in the input's dtype
    recompute    4  forward keeps nothing of that size, backward makes the logits again in chunks
    frozen_head  2  weight and bias need no gradient: forward keeps the (M, D) direction of dX
    no_grad      1  nothing is kept

`budget` bounds the bytes of all (rows, V) buffers alive at once, in either direction.
"""

import torch

from sepo_kernels.platform import accumulator

SAVE, RECOMPUTE, FROZEN_HEAD, NO_GRAD = "save", "recompute", "frozen_head", "no_grad"
DEFAULT_BUDGET = 1 << 30  # bytes: M = 10 922 rows of a bfloat16 V = 49 152 head are saved within it
# the forward of `save` works in chunks too; fewer rows than this re-read the weight too often
SAVE_MIN_CHUNK = 256


def choose(
    M: int,
    V: int,
    dtype: torch.dtype,
    capped: bool,
    budget: int,  # bytes
    need_hidden: bool,
    need_head: bool,  # weight or bias needs a gradient
) -> str:
    if not (need_hidden or need_head):
        return NO_GRAD
    if not need_head:
        return FROZEN_HEAD
    scratch = min(M, SAVE_MIN_CHUNK) * save_scratch_bytes(V, dtype, capped)
    return SAVE if M * V * dtype.itemsize + scratch <= budget else RECOMPUTE


def row_bytes(V: int, dtype: torch.dtype, capped: bool, gradient: bool) -> int:
    """Bytes of (1, V) buffers alive for each row of a chunk.

    One accumulator buffer goes from logits to probabilities in place. A gradient adds a copy in
    the input's dtype, where that differs, for the matrix product; a soft cap adds its derivative.
    """
    wide = accumulator(dtype).itemsize
    if not gradient:
        return V * wide
    return V * (wide + (dtype.itemsize if dtype.itemsize != wide else 0) + (wide if capped else 0))


def save_scratch_bytes(V: int, dtype: torch.dtype, capped: bool) -> int:
    """`row_bytes` of `save` without the row that is kept: zero for a float32 head without cap."""
    return row_bytes(V, dtype, capped, gradient=True) - V * dtype.itemsize


def chunk_rows(
    M: int,
    V: int,
    dtype: torch.dtype,
    capped: bool,
    budget: int,  # bytes
    schedule: str,
    backward: bool,
) -> int:
    """Rows of one chunk, at least 1; chunks are of equal size but for the last."""
    if schedule == SAVE:
        scratch = save_scratch_bytes(V, dtype, capped)
        # the backward of `save` makes no (rows, V) buffer of its own
        if backward or scratch == 0:
            return max(1, M)
        limit = (budget - M * V * dtype.itemsize) // scratch
    else:
        gradient = backward or schedule == FROZEN_HEAD
        limit = budget // row_bytes(V, dtype, capped, gradient)
    limit = max(1, limit)
    parts = max(1, -(-M // limit))
    return max(1, -(-M // parts))


def kept_shape(schedule: str, M: int, V: int, D: int) -> tuple[int, ...]:
    """Shape of what the forward keeps for the backward, in the input's dtype."""
    return {SAVE: (M, V), FROZEN_HEAD: (M, D)}.get(schedule, (0,))


def fwd_gemms(schedule: str) -> int:
    return 2 if schedule == FROZEN_HEAD else 1


def bwd_gemms(schedule: str, need_hidden: bool, need_weight: bool) -> int:
    if schedule in (FROZEN_HEAD, NO_GRAD):
        return 0
    return need_hidden + need_weight + (schedule == RECOMPUTE)
