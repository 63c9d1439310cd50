"""Count the tokens that segment_topk selects of each segment: sizes and offsets of its outputs."""

import torch
from torch import Tensor


def selected_offsets(
    cu_tokens: Tensor,  # (S + 1,) int32 or int64, on the CPU or on `device`
    fraction: float,
    min_tokens: int,
    device: torch.device,  # the score's
) -> tuple[Tensor, Tensor, int]:  # cu_tokens and cu_rows, each (S + 1,) int32 on `device`; M
    """Return the offsets of all and of the selected tokens, and how many are selected."""
    length = cu_tokens.diff()  # (S,)
    # float64, with the 1e-9: 0.29 * 100 is 28.999999999999996
    count = (length.double() * fraction + 1e-9).floor().long().clamp(min=min_tokens)
    cu_rows = torch.nn.functional.pad(torch.minimum(count, length).cumsum(0), (1, 0))
    M = int(cu_rows[-1])  # the only synchronisation, and none where cu_tokens is on the CPU
    both = torch.stack([cu_rows, cu_tokens]).int()
    if both.device != device:
        # one copy, from pinned memory: from other memory the CUDA driver may synchronise
        both = both.pin_memory().to(device, non_blocking=True)
    cu_rows, cu_tokens = both.unbind()
    return cu_tokens, cu_rows, M
