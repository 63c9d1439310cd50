"""target_logits by the native CPU kernels of csrc/cpu: rows of the head are read where they lie."""

import torch
from torch import Tensor

from sepo_kernels import extension
from sepo_kernels.target_logits.loops import TargetKernels

# evaluated once, at import: Dynamo traces why_not
_MISSING = extension.why_not("native_target_dots", torch.device("cpu"))


def dots(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64
    budget: int,  # unread: nothing is gathered
) -> Tensor:  # (M, K) accumulator dtype
    return torch.ops.sepo.native_target_dots(hidden, weight, rows, targets)


def sum_targets(
    coefficient: Tensor,  # (M, K) accumulator dtype
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M, K) int64
    budget: int,  # unread
) -> Tensor:  # (M, D) accumulator dtype
    return torch.ops.sepo.native_target_sums(coefficient, weight, targets)


def add_to_targets(
    grad_weight: Tensor,  # (V, D), added to
    coefficient: Tensor,  # (M, K) accumulator dtype
    hidden: Tensor,  # (N, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M, K) int64
    budget: int,  # unread
) -> None:
    ordered, order = targets.flatten().sort(stable=True)
    torch.ops.sepo.native_target_add(grad_weight, coefficient, hidden, rows, ordered, order)


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"expected tensors on a CPU, got {hidden.device}"
    return _MISSING


KERNELS = TargetKernels(dots, sum_targets, add_to_targets)
