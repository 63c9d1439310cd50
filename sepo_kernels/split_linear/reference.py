"""The definition of split_linear, and what it computes of it. Slow, and the oracle."""

import torch
from torch import Tensor


def split_linear(
    x: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
) -> Tensor:  # (N, V), in the dtype of x
    """Return x @ weight.T + bias, in float64 for the truth."""
    y = x @ weight.T
    return y if bias is None else y + bias


def products_of_bfloat16_halves(
    x: Tensor,  # (N, D) float32, finite and within bfloat16's range
    weight: Tensor,  # (V, D) float32, the same
) -> Tensor:  # (N, V) float64
    """Return what is computed of it, without the rounding of sums."""
    (x_hi, x_lo), (hi, lo) = _halves(x), _halves(weight)
    return x_hi @ hi.T + x_lo @ hi.T + x_hi @ lo.T


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    hi = x.to(torch.bfloat16).double()
    return hi, (x.double() - hi).to(torch.bfloat16).double()
