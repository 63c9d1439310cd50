"""segment_sum and segment_mean: from one number a token to one number a response."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.ops._checks import check_reverse_mode
from sepo.ops._offsets import check_values
from sepo_kernels.registry import pick
from sepo_kernels.segment_reduce import IMPLS


def segment_sum(
    values: Tensor,  # (M,) float32 or float64, segments contiguous
    cu_rows: Tensor,  # (S + 1,) int32 or int64, from 0 to M
) -> Tensor:  # (S,)
    """Sum each segment, in the unit of `values`; an empty segment gives 0 and no gradient.

    A NaN stays in its own segment. The result is the same bit for bit each time, on a GPU too.

    Args:
        values: (M,) float32 or float64, one number a token, the segments end to end.
        cu_rows: (S + 1,) int32 or int64, on the same device: segment s is
            values[cu_rows[s] : cu_rows[s + 1]]; from 0 to M.

    Returns:
        Tensor: (S,) in the dtype of values, differentiable in values.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or offsets on the CPU that do not
            rise from 0 to M.
        NotImplementedError: for values with a tangent (jvp): there is no forward mode.
    """
    _check(values, cu_rows)
    check_reverse_mode("segment_sum", values)
    return _SegmentSum.apply(values, cu_rows, pick(IMPLS, "auto", values, cu_rows).name)


def segment_mean(
    values: Tensor,  # (M,) float32 or float64, segments contiguous
    cu_rows: Tensor,  # (S + 1,) int32 or int64, from 0 to M
) -> Tensor:  # (S,)
    """Average each segment, in the unit of `values`; an empty segment gives 0 and no gradient.

    The u / gamma of SePO (arXiv 2408.13518) eq. 11: the divisor is the number of selected tokens.

    Args:
        values: (M,) float32 or float64, one number a token, the segments end to end.
        cu_rows: (S + 1,) int32 or int64, on the same device: segment s is
            values[cu_rows[s] : cu_rows[s + 1]]; from 0 to M.

    Returns:
        Tensor: (S,) in the dtype of values, differentiable in values.

    Raises:
        ValueError: as `segment_sum`.
        NotImplementedError: as `segment_sum`.
    """
    return segment_sum(values, cu_rows) / cu_rows.diff().clamp(min=1)


def _check(values: Tensor, cu_rows: Tensor) -> None:
    if values.ndim != 1 or cu_rows.ndim != 1 or cu_rows.shape[0] == 0:
        raise ValueError(
            "expected values (M,) and cu_rows (S + 1,), "
            f"got {tuple(values.shape)} and {tuple(cu_rows.shape)}"
        )
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64 values, got {values.dtype}")
    if cu_rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected int32 or int64 cu_rows, got {cu_rows.dtype}")
    if values.device != cu_rows.device:
        raise ValueError(f"expected one device, got {values.device} and {cu_rows.device}")


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_rows: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(cu_rows)
        ctx.M, ctx.impl = values.shape[0], impl
        return _fwd(values, cu_rows, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor, None, None]:
        (cu_rows,) = ctx.saved_tensors
        return _bwd(grad_sum, cu_rows, ctx.M, ctx.impl), None, None


torch.library.define("sepo::segment_sum_fwd", "(Tensor values, Tensor cu_rows, str impl) -> Tensor")
torch.library.define(
    "sepo::segment_sum_bwd", "(Tensor grad_sum, Tensor cu_rows, SymInt M, str impl) -> Tensor"
)
_BY_NAME: dict[str, Any] = {impl.name: impl for impl in IMPLS}  # all have a bwd


def _run_fwd(values: Tensor, cu_rows: Tensor, impl: str) -> Tensor:
    check_values("cu_rows", cu_rows, values.shape[0])
    return _BY_NAME[impl].fwd(values, cu_rows)


def _run_bwd(grad_sum: Tensor, cu_rows: Tensor, M: int, impl: str) -> Tensor:
    return _BY_NAME[impl].bwd(grad_sum, cu_rows, M)


def _fake_fwd(values: Tensor, cu_rows: Tensor, impl: str) -> Tensor:
    return values.new_empty((cu_rows.shape[0] - 1,))


def _fake_bwd(grad_sum: Tensor, cu_rows: Tensor, M: int, impl: str) -> Tensor:
    return grad_sum.new_empty((M,))


torch.library.impl("sepo::segment_sum_fwd", ("cpu", "cuda"), _run_fwd)
torch.library.impl("sepo::segment_sum_bwd", ("cpu", "cuda"), _run_bwd)
torch.library.register_fake("sepo::segment_sum_fwd", _fake_fwd)
torch.library.register_fake("sepo::segment_sum_bwd", _fake_bwd)
_fwd = torch.ops.sepo.segment_sum_fwd.default
_bwd = torch.ops.sepo.segment_sum_bwd.default
