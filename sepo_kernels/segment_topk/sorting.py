"""segment_topk by two stable sorts: by score, then by segment. No loop over segments."""

import torch
from torch import Tensor

from sepo_kernels.segment_topk.counts import selected_offsets


def fwd(
    score: Tensor,  # (T_all,)
    cu_tokens: Tensor,  # (S + 1,) int32 or int64, on the CPU or with score
    fraction: float,
    side: str,  # "highest" | "lowest" | "alternate"
    min_tokens: int,
) -> tuple[Tensor, Tensor]:  # index (M,) int32, cu_rows (S + 1,) int32
    cu_tokens, cu_rows, M = selected_offsets(cu_tokens, fraction, min_tokens, score.device)
    cu = cu_tokens.long()
    place = torch.arange(score.shape[0], device=score.device)
    segment = torch.searchsorted(cu[1:], place, right=True)  # (T_all,), skips empty segments
    if side == "alternate":
        key = torch.where(segment % 2 == 0, -score, score)
    else:
        key = -score if side == "highest" else score
    # CUDA sorts a NaN whose sign is set, as negation may set it, before all numbers
    key = key.masked_fill(score.isnan(), float("nan"))
    by_score = key.argsort(stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]  # by segment, then score, then place
    # after the second sort, place i holds rank i - cu[segment] of the segment of token i
    chosen = place - cu[segment] < cu_rows.diff()[segment]
    keep = torch.zeros_like(chosen).index_put_((order,), chosen)
    # static: the size is known, and without it a GPU would synchronise
    return torch.nonzero_static(keep, size=M)[:, 0].int(), cu_rows
