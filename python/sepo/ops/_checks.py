"""Check the arguments of the head's operations: ValueErrors, expected then got.

Shapes, dtypes and devices are checked at the public edge, under torch.compile too. Index values
are checked inside the operators, and on the CPU only: a GPU would wait for the answer.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sepo_kernels.devices import accumulator
from sepo_kernels.scales import Scale


def check_one_head(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,)
    targets: Tensor,  # (M,)
    bias: Tensor | None,  # (V,)
    scale: Scale,  # a number, or (M,)
    softcap: float | None,
) -> None:
    check_head(hidden, weight, bias)
    check_indices(rows, targets)
    check_one_device(hidden, weight, rows, targets, bias)
    check_scale(scale, rows, hidden)
    check_softcap(softcap)


def check_head(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    prefix: str = "",  # of the arguments' names: "ref_" for the reference's head
) -> None:
    h, w, b = (prefix + name for name in ("hidden", "weight", "bias"))
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected {h} (N, D) and {w} (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"expected a floating-point {h}, got {hidden.dtype}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"expected one dtype, got {h} {hidden.dtype}, {w} {weight.dtype}")
    for name, x in ((h, hidden), (w, weight)):
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"expected {name} with contiguous rows, got strides {x.stride()}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"expected {b} ({weight.shape[0]},) {weight.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )


def check_indices(
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M,) int64
) -> None:
    if rows.ndim != 1 or rows.shape != targets.shape:
        raise ValueError(
            "expected rows (M,) and targets (M,), "
            f"got {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if rows.dtype not in (torch.int32, torch.int64) or targets.dtype != torch.int64:
        raise ValueError(
            f"expected int32 or int64 rows and int64 targets, got {rows.dtype} and {targets.dtype}"
        )


def check_one_device(hidden: Tensor, *others: Tensor | None) -> None:
    for x in others:
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"expected all tensors on one device, got {x.device} and {hidden.device}"
            )


def check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"expected softcap > 0 or None, got {softcap}")


def check_scale(
    scale: Scale,  # a number, or (M,)
    rows: Tensor,  # (M,)
    hidden: Tensor,  # (N, D)
) -> None:
    if not isinstance(scale, Tensor):
        return
    dtype = accumulator(hidden.dtype)
    if scale.shape != rows.shape or scale.dtype != dtype:
        raise ValueError(
            f"expected scale a number, or ({rows.shape[0]},) {dtype}, "
            f"got {tuple(scale.shape)} {scale.dtype}"
        )
    check_one_device(hidden, scale)
    if torch.is_grad_enabled() and scale.requires_grad:
        raise ValueError("expected scale without a gradient, got one that requires it")


def check_reverse_mode(operation: str, *inputs: Tensor | None) -> None:
    """Raise NotImplementedError for an input with a tangent, which would be lost without a word."""
    if forward_ad._current_level < 0:  # no dual level is open: nothing to look for
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"{operation}: expected reverse mode (backward, torch.autograd.grad), got an input with a"
            " tangent (jvp, jacfwd)"
        )


def check_index_values(
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M,) int64
    N: int,
    V: int,
) -> None:
    """Raise ValueError for a row or target out of range, if both are on the CPU; else do nothing."""
    for name, index, size in (("rows", rows, min(N, 2**31)), ("targets", targets, V)):
        if index.device.type != "cpu" or index.shape[0] == 0:
            continue
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ValueError(f"expected 0 <= {name} < {size}, got {wrong}")


def check_scale_values(scales: Tensor | None) -> None:  # (M,), one a row
    """Raise ValueError for a scale that is not positive, if it is on the CPU; else do nothing."""
    if scales is None or scales.device.type != "cpu" or scales.shape[0] == 0:
        return
    low = float(scales.amin())  # NaN if there is one
    if not low > 0:
        raise ValueError(f"expected scale > 0 in every row, got {low}")


def as_int32(rows: Tensor) -> Tensor:
    """Cast rows to what the kernels read.

    int64 rows beyond int32's range are cut to its ends, so that on a GPU, where nobody looks at
    them, they do not wrap around to rows that exist.
    """
    limits = torch.iinfo(torch.int32)
    return rows if rows.dtype == torch.int32 else rows.clamp(limits.min, limits.max).int()
