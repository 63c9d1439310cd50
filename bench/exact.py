"""Matrix products in float64 over blocks of the vocabulary, so that no (V, D) copy is kept."""

import torch
from torch import Tensor

from bench.dtypes import product

BLOCK = 16384  # rows of the weight in float64 at once: 0.5 GB at D = 4096


def logits(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
) -> Tensor:  # (M, V) float64
    out = x.new_empty((len(x), len(weight)), dtype=torch.float64)
    for part, block in zip(out.split(BLOCK, dim=1), weight.split(BLOCK), strict=True):
        part.copy_(x.double() @ block.double().T)
    return out


def gradients(
    d_logits: Tensor,  # (M, V) float64
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    need_weight: bool,
) -> dict[str, Tensor]:  # grad_hidden (N, D), grad_weight (V, D), float64
    x = hidden[rows].double()
    grad_x = torch.zeros_like(x)
    grad_weight = x.new_empty(weight.shape) if need_weight else None
    for start in range(0, len(weight), BLOCK):
        part = d_logits[:, start : start + BLOCK]
        grad_x += part @ weight[start : start + BLOCK].double()
        if need_weight:
            grad_weight[start : start + BLOCK] = part.T @ x
    grad_hidden = x.new_zeros(hidden.shape).index_add_(0, rows.long(), grad_x)
    return {"grad_hidden": grad_hidden} | ({"grad_weight": grad_weight} if need_weight else {})


def rounded_once(
    d_logits: Tensor,  # (M, V) float64
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
) -> dict[str, Tensor]:  # grad_hidden (N, D), grad_weight (V, D), in the dtype of the inputs
    """What the products of the input's dtype give when dZ is exact but for one rounding to it."""
    dz = d_logits.to(weight.dtype)
    grad_hidden = torch.zeros_like(hidden).index_add_(0, rows.long(), product(dz, weight))
    return {"grad_hidden": grad_hidden, "grad_weight": product(dz.T, hidden[rows])}


def relative_error(got: Tensor, true: Tensor) -> float:
    """max |got - true| / max |true|, in blocks of rows."""
    if got.shape != true.shape:
        return float("inf")
    worst = 0.0
    for a, b in zip(got.split(BLOCK), true.split(BLOCK), strict=True):
        error = (a.double() - b).abs().max().item()
        worst = error if not error <= worst else worst  # a NaN stays
    return worst / max(true.abs().max().item(), 1e-300)


def absolute_error(got: Tensor, true: Tensor) -> float:
    if got.shape != true.shape:
        return float("inf")
    return (got.double() - true).abs().max().item()


def gradient_limits(
    plain: dict[str, float],  # errors of plain PyTorch in the same dtype
    ours: bool,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The tests' rule for ours, 2 x plain PyTorch + rounding of the output; 8 x for a peer."""
    factor, rounding = 2 if ours else 8, torch.finfo(dtype).eps
    return {n: factor * error + rounding for n, error in plain.items() if n.startswith("grad_")}
