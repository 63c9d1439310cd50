"""Error budgets that come from the data, not from a table of tolerances."""

import torch
from torch import Tensor


def max_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_as_accurate(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, what: str, factor: float = 2.0
) -> None:
    """Require max|actual - truth| <= factor * max|baseline - truth| + rounding of the output.

    truth: the reference in float64; baseline: the plain PyTorch code in the kernel's own dtype.
    """
    assert actual.shape == truth.shape, f"{what}: {tuple(actual.shape)} != {tuple(truth.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error, allowed = max_error(actual, truth), max_error(baseline, truth)
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max().item() if truth.numel() else 0.0
    assert error <= factor * allowed + rounding, (
        f"{what}: error {error:.3e} > {factor} x {allowed:.3e} + {rounding:.3e}"
    )
