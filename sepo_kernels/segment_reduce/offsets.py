"""segment_sum over offsets: each segment is summed alone, in order, without atomics.

Not a difference of cumulative sums: a NaN would reach every later segment, and a long buffer
would cost precision.
"""

import torch
from torch import Tensor


def fwd(
    values: Tensor,  # (M,) float32 or float64
    cu_rows: Tensor,  # (S + 1,) int32 or int64
) -> Tensor:  # (S,)
    # in double, because it adds one value after the other, and float32 would lose four digits of
    # 70 000; unsafe: skips a check that would synchronise
    options = dict(offsets=cu_rows.long(), initial=0.0, unsafe=True)
    return torch.segment_reduce(values.double(), "sum", **options).to(values.dtype)


def bwd(
    grad_sum: Tensor,  # (S,)
    cu_rows: Tensor,  # (S + 1,) int32 or int64
    M: int,
) -> Tensor:  # (M,)
    # output_size: without it the length would be read back from the device
    return grad_sum.repeat_interleave(cu_rows.diff(), output_size=M)
