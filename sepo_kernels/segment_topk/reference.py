"""The definition of segment_topk: a loop over segments, in Python numbers."""

import math

import torch
from torch import Tensor


def segment_topk(
    score: Tensor,  # (T_all,)
    cu_tokens: Tensor,  # (S + 1,)
    fraction: float,
    side: str,  # "highest" | "lowest" | "alternate"
    *,
    min_tokens: int = 1,
) -> tuple[Tensor, Tensor]:  # index (M,) int32, cu_rows (S + 1,) int32
    values, cu = score.tolist(), cu_tokens.tolist()
    index, cu_rows = [], [0]
    for segment, (start, stop) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        T = stop - start
        K = min(T, max(min_tokens, math.floor(fraction * T + 1e-9)))
        highest = side == "highest" or (side == "alternate" and segment % 2 == 0)

        # best first; NaN last on both sides; ties to the earlier
        def rank(t: int, highest: bool = highest) -> tuple[bool, float]:
            value = values[t]
            return (math.isnan(value), 0.0 if math.isnan(value) else -value if highest else value)

        index += sorted(sorted(range(start, stop), key=rank)[:K])
        cu_rows.append(len(index))
    return torch.tensor(index, dtype=torch.int32), torch.tensor(cu_rows, dtype=torch.int32)
