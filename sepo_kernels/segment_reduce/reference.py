"""The definition of segment_sum: a loop over segments."""

import torch
from torch import Tensor


def segment_sum(
    values: Tensor,  # (M,)
    cu_rows: Tensor,  # (S + 1,)
) -> Tensor:  # (S,)
    cu = cu_rows.tolist()
    parts = [values[a:b].sum() for a, b in zip(cu[:-1], cu[1:], strict=True)]
    return torch.stack(parts) if parts else values.new_zeros((0,))
