"""segment_topk by two stable sorts: by score, then by segment. No loop over segments."""

import torch
from torch import Tensor


def fwd(
    score: Tensor,  # (T_all,)
    cu_tokens: Tensor,  # (S + 1,) int32 or int64
    fraction: float,
    side: str,  # "highest" | "lowest" | "alternate"
    min_tokens: int,
) -> tuple[Tensor, Tensor]:  # index (M,) int32, cu_rows (S + 1,) int32
    cu = cu_tokens.long()
    length = cu.diff()  # (S,)
    # float64, with the 1e-9: 0.29 * 100 is 28.999999999999996
    count = (length.double() * fraction + 1e-9).floor().long().clamp(min=min_tokens)
    count = torch.minimum(count, length)
    cu_rows = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()

    place = torch.arange(score.shape[0], device=score.device)
    segment = torch.searchsorted(cu[1:], place, right=True)  # (T_all,), skips empty segments
    if side == "alternate":
        key = torch.where(segment % 2 == 0, -score, score)
    else:
        key = -score if side == "highest" else score
    by_score = key.argsort(stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]  # by segment, then score, then place
    # after the second sort, place i holds rank i - cu[segment] of the segment of token i
    chosen = place - cu[segment] < count[segment]
    keep = torch.zeros_like(chosen).index_put_((order,), chosen)
    return keep.nonzero()[:, 0].int(), cu_rows
