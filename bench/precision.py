"""In which dtype a device multiplies fastest; how far a result is from the truth, and may be."""

import torch
from torch import Tensor

from sepo_kernels import platform

BLOCK = 16384  # rows in float64 at once: 0.5 GB at D = 4096


def fast(device: torch.device | str) -> torch.dtype:
    """What the device multiplies fastest, of bfloat16 and float32."""
    found = getattr(platform, "fast_dtype", None)  # --base may ask of a commit that has none
    return found(device) if found else torch.bfloat16


def quick(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """`dtype`, but float32 in bfloat16's place where the device multiplies that faster."""
    return fast(device) if dtype == torch.bfloat16 else dtype


def product(a: Tensor, b: Tensor) -> Tensor:  # in the dtype of a
    """a @ b, in minutes less where bfloat16 is slow: there of widened operands, rounded once.

    That is how bfloat16's own product rounds, so an error measured of it is that of bfloat16.
    """
    dtype = quick(a.dtype, a.device)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def logits(x: Tensor, weight: Tensor) -> Tensor:  # (M, D), (V, D) -> (M, V) float64
    """By blocks of the vocabulary, so that no (V, D) copy in float64 is kept."""
    out = x.new_empty((len(x), len(weight)), dtype=torch.float64)
    for part, block in zip(out.split(BLOCK, dim=1), weight.split(BLOCK), strict=True):
        part.copy_(x.double() @ block.double().T)
    return out


def gradients(
    d_logits: Tensor,  # (M, V) float64
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    need_weight: bool = True,
) -> dict[str, Tensor]:  # grad_hidden (N, D), grad_weight (V, D), float64
    """The same by blocks."""
    x, parts = hidden[rows].double(), d_logits.split(BLOCK, dim=1)
    grad_x, found = torch.zeros_like(x), {}
    for part, block in zip(parts, weight.split(BLOCK), strict=True):
        grad_x += part @ block.double()
    if need_weight:
        found["grad_weight"] = torch.cat([part.T @ x for part in parts])
    grad_hidden = x.new_zeros(hidden.shape).index_add_(0, rows.long(), grad_x)
    return {"grad_hidden": grad_hidden} | found


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


def absolute_error(got: Tensor, true: Tensor) -> float:
    """max |got - true|, in blocks of rows; infinite where shapes differ, NaN where one is."""
    if got.shape != true.shape:
        return float("inf")
    blocks = zip(*(torch.atleast_1d(x).split(BLOCK) for x in (got, true)), strict=True)
    return torch.stack([(a.double() - b).abs().max() for a, b in blocks]).max().item()


def relative_error(got: Tensor, true: Tensor) -> float:
    """The same over max |true|."""
    return absolute_error(got, true) / max(true.abs().max().item(), 1e-300)


def limits(
    plain: dict[str, float],  # errors of plain PyTorch in the same dtype
    ours: bool,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The tests' rule for ours, 2 x plain PyTorch + rounding of the output; 8 x for a peer."""
    factor, rounding = 2 if ours else 8, torch.finfo(dtype).eps
    return {name: factor * error + rounding for name, error in plain.items()}
