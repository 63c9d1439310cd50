"""Which response a token belongs to."""

import torch
from torch import Tensor


def segment_of(cu_rows: Tensor, size: int) -> Tensor:  # (size,) int64
    """Return the index of each token's response; `cu_rows` (S + 1,) goes from 0 to `size`."""
    responses = torch.arange(len(cu_rows) - 1, device=cu_rows.device)
    # a size given is a size not asked of the device
    return torch.repeat_interleave(responses, cu_rows.diff(), output_size=size)
