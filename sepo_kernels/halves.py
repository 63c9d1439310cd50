"""A float32 number as the sum of two short ones, and the largest error of products made of them.

With x = hi + lo and hi the nearest number of few bits, x W is about x_hi W_hi + x_lo W_hi +
x_hi W_lo. A GPU multiplies the short numbers at their own rate and sums in float32. Two products
are enough where every W_lo is zero: a checkpoint in bfloat16 is made of such weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sepo_kernels.gemm import WIDE_TILE_BYTES


class Kind(NamedTuple):
    """Name what a half is made of."""

    dtype: torch.dtype  # that holds it
    bits: int  # of its significand, the first included
    largest: float  # finite one; float32's own range goes a little further


KINDS = {
    "bfloat16": Kind(torch.bfloat16, 8, torch.finfo(torch.bfloat16).max),
    "tf32": Kind(torch.float32, 11, (2 - 2.0**-10) * 2.0**127),
}


def kind_of(half: Tensor) -> str:
    return "bfloat16" if half.dtype == torch.bfloat16 else "tf32"


def halves(
    x: Tensor,  # float32
    kind: str,  # of KINDS
) -> tuple[Tensor, Tensor]:  # hi, lo, in the kind's dtype
    """Return the nearest number with the kind's bits, and the nearest to what is left.

    hi is finite, also where the nearest would be infinite; what is not finite is in lo. So sums of
    products are not finite where float32's are not.
    """
    largest, nearest = KINDS[kind].largest, _NEAREST[kind]
    hi = nearest(x.clamp(-largest, largest))
    return hi, nearest(x - hi)


def weight_halves(
    weight: Tensor,  # (V, D) float32
    kind: str,  # of KINDS
) -> tuple[Tensor, Tensor | None]:  # hi, lo (V, D); None: zero everywhere
    """Return the halves of what is multiplied often; synchronises once.

    They are made a tile at a time: nothing else of the weight's size is held.
    """
    hi = torch.empty_like(weight, dtype=KINDS[kind].dtype, memory_format=torch.contiguous_format)
    lo = torch.empty_like(hi)
    rows = max(1, WIDE_TILE_BYTES // max(1, weight.shape[1] * weight.itemsize))
    for part in zip(weight.split(rows), hi.split(rows), lo.split(rows), strict=True):
        for half, made in zip(part[1:], halves(part[0], kind), strict=True):
            half.copy_(made)
    return hi, lo if bool(lo.any()) else None


def side_by_side(
    x: tuple[Tensor, Tensor],  # hi, lo (N, D)
    weight: tuple[Tensor, Tensor | None],  # hi, lo (V, D)
) -> tuple[Tensor, Tensor]:  # (N, 2 D or 3 D), (V, the same)
    """Return what one product multiplies to give the sum of two or three."""
    hi, lo = weight
    third = ([], []) if lo is None else ([x[0]], [lo])
    return torch.cat([*x, *third[0]], 1), torch.cat([hi, hi, *third[1]], 1)


def error_bound(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    kind: str,  # of KINDS
    products: int,  # 2: the weight's lo is zero
) -> Tensor:  # (N, V) float64
    """Return how far a sum of products of halves may be from x @ weight.T; it grows with D.

    Halves leave 2^-2b of x and of W, with b bits each, and lo lo is left out. The float32 sum of
    2 D or 3 D terms adds at most 2^-23 of all of them for each: tensor cores cut, where a CPU
    rounds. The sizes are those of sum |x| |W|.
    """
    left_out = (1 if products == 2 else 3) * 2.0 ** (-2 * KINDS[kind].bits)
    summed = products * x.shape[1] * 2.0**-23
    size = x.double().abs() @ weight.double().abs().T
    return 1.01 * (left_out + summed) * size  # 1.01: halves of halves, to second order


def to_tf32(
    x: Tensor,  # float32
) -> Tensor:  # float32
    """Return the nearest number with 10 bits of mantissa, ties to even."""
    assert x.dtype == torch.float32, x.dtype
    bits = x.contiguous().view(torch.int32)
    last = (bits >> 13) & 1  # of the bits that stay: halves go to where it is 0
    rounded = ((bits + 0xFFF + last) & ~0x1FFF).view(torch.float32)
    return rounded.where(x.isfinite(), x)  # the sum of a NaN's bits may overflow


_NEAREST = {"bfloat16": Tensor.bfloat16, "tf32": to_tf32}
