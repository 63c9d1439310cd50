"""The Triton kernel of split_linear: a tile of y from tiles of float32 rows and of a weight's halves.

Each program owns one tile of y and sums over D in one order: no atomics, the same bits twice.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """Sizes of what a program reads at once. Not yet measured on a GPU."""

    BLOCK_N: int = 128  # rows of x and y
    BLOCK_V: int = 128  # columns of y
    BLOCK_D: int = 32
    GROUP: int = 8  # tiles of rows that share the columns of the weight in the cache
    num_warps: int = 8
    num_stages: int = 2  # with 3 sm_80 spills


TILE = Tile()
# one compilation serves all sizes; strides and pointers decide how wide loads are
UNSPECIALISED = ["N", "V", "has_bias"]
LARGEST = tl.constexpr(3.3895313892515355e38)  # of bfloat16: nearest to float32's would be infinite


def launch(*args: Any, THREE: bool) -> None:
    """Run the kernel on its `args`, one program a tile of y."""
    N, V = args[7:9]
    grid = (triton.cdiv(N, TILE.BLOCK_N) * triton.cdiv(V, TILE.BLOCK_V),)
    if 0 in grid:
        return
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(args[0]):
        split_linear_tile[grid](*args, THREE=THREE, **TILE._asdict())


@triton.jit(do_not_specialize=UNSPECIALISED)
def split_linear_tile(
    x_ptr,  # (N, D) float32
    hi_ptr,  # (V, D) bfloat16, or float32 that holds it
    lo_ptr,  # (V, D), not read unless THREE
    bias_ptr,  # (V,) float32, not read unless has_bias
    y_ptr,  # (N, V) float32
    stride_x,
    stride_w,  # of hi and lo
    N,
    V,
    D,
    has_bias,
    THREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    n, v = _place(N, V, BLOCK_N, BLOCK_V, GROUP)
    n_ok, v_ok = n < N, v < V
    # int64 before the multiply: row * stride passes 2**31 on long packs
    x_rows = x_ptr + n[:, None].to(tl.int64) * stride_x
    w_rows = v[None, :].to(tl.int64) * stride_w
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < D
        x = tl.load(x_rows + d[None, :], mask=n_ok[:, None] & d_ok[None, :], other=0.0)
        at, w_ok = w_rows + d[:, None], v_ok[None, :] & d_ok[:, None]
        hi = tl.load(hi_ptr + at, mask=w_ok, other=0.0)  # [BLOCK_D, BLOCK_V]
        x_hi = _nearest(_finite(x), hi_ptr.dtype.element_ty)
        x_lo = _nearest(x - x_hi.to(tl.float32), hi_ptr.dtype.element_ty)
        total = tl.dot(x_lo, hi, total, input_precision="ieee")
        if THREE:
            lo = tl.load(lo_ptr + at, mask=w_ok, other=0.0)
            total = tl.dot(x_hi, lo, total, input_precision="ieee")
        total = tl.dot(x_hi, hi, total, input_precision="ieee")
    total += tl.load(bias_ptr + v, mask=v_ok & (has_bias != 0), other=0.0)[None, :]
    y = y_ptr + n[:, None].to(tl.int64) * V + v[None, :]
    tl.store(y, total, mask=n_ok[:, None] & v_ok[None, :])


@triton.jit
def _place(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's rows and columns; neighbours share columns, GROUP tiles of rows deep."""
    program, down, across = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    first = program // (GROUP * across) * GROUP
    deep = tl.minimum(GROUP, down - first)
    within = program % (GROUP * across)
    n = (first + within % deep) * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, within // deep * BLOCK_V + tl.arange(0, BLOCK_V)


@triton.jit
def _finite(x):
    """Return x within bfloat16's range; a NaN becomes a number, and stays in what is left of x."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def _nearest(x, HALF: tl.constexpr):
    """Return the nearest bfloat16, ties to even; in float32 where that stands in for it."""
    if HALF == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # the sum of a NaN's bits, or an infinity's, is left alone
        return tl.where(tl.abs(x) <= LARGEST, nearest.to(tl.float32, bitcast=True), x)
