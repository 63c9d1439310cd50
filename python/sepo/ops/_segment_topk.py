"""segment_topk: the k % of each segment with the highest or lowest scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from sepo.ops._offsets import check_values
from sepo_kernels.registry import pick
from sepo_kernels.segment_topk import IMPLS

SIDES = ("highest", "lowest", "alternate")


class SegmentTopk(NamedTuple):
    """Name the results of `segment_topk`.

    Attributes:
        indices: (M,) int32 into the score, ascending.
        cu_rows: (S + 1,) int32, from 0 to M: segment s has indices[cu_rows[s] : cu_rows[s + 1]].
    """

    indices: Tensor  # (M,) int32
    cu_rows: Tensor  # (S + 1,) int32


def segment_topk(
    score: Tensor,  # (T_all,) floating point, the responses end to end
    cu_tokens: Tensor,  # (S + 1,) int32 or int64, from 0 to T_all; on the CPU or with score
    fraction: float,  # 0 < fraction <= 1
    side: str,  # "highest" | "lowest" | "alternate": even segments highest, odd ones lowest
    *,
    min_tokens: int = 1,  # selected at least, where the segment has as many
    impl: str = "auto",
) -> SegmentTopk:  # indices (M,) int32 into score, ascending; cu_rows (S + 1,) int32
    """Select K = max(min_tokens, floor(fraction * T + 1e-9)) of each segment's T tokens, at most T.

    SePO (arXiv 2408.13518) section 3.2: the highest scores of a chosen response, the lowest of a
    rejected one. Ties go to the earlier token; an empty segment selects nothing. A NaN ranks last
    on both sides. No gradient. With cu_tokens on the CPU nothing synchronises; with cu_tokens on a
    GPU M is read back to size the output.

    Args:
        score: (T_all,) floating point, one number a token, the segments end to end.
        cu_tokens: (S + 1,) int32 or int64, on the CPU or with score: segment s is
            score[cu_tokens[s] : cu_tokens[s + 1]]; from 0 to T_all.
        fraction: how many of a segment's tokens are selected, in (0, 1].
        side: "highest", "lowest" or "alternate": even segments highest, odd ones lowest.
        min_tokens: selected at least, where the segment has as many.
        impl: "auto", or a name of an implementation: "native", "sorting".

    Returns:
        SegmentTopk: indices (M,) int32 into score, ascending, and cu_rows (S + 1,) int32, where the
        score is.

    Raises:
        ValueError: for a fraction outside (0, 1], an unknown side, a negative min_tokens, shapes,
            dtypes and devices that do not fit, offsets on the CPU that do not rise from 0 to T_all,
            and an `impl` that is unknown or cannot run.
    """
    _check(score, cu_tokens, fraction, side, min_tokens)
    chosen = pick(IMPLS, impl, score, cu_tokens)
    return SegmentTopk(*_fwd(score.detach(), cu_tokens, fraction, side, min_tokens, chosen.name))


def _check(score: Tensor, cu_tokens: Tensor, fraction: float, side: str, min_tokens: int) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"expected 0 < fraction <= 1, got {fraction}")
    if side not in SIDES:
        raise ValueError(f'expected side to be one of {", ".join(SIDES)}, got "{side}"')
    if min_tokens < 0:
        raise ValueError(f"expected min_tokens >= 0, got {min_tokens}")
    if score.ndim != 1 or cu_tokens.ndim != 1 or cu_tokens.shape[0] == 0:
        raise ValueError(
            "expected score (T_all,) and cu_tokens (S + 1,), "
            f"got {tuple(score.shape)} and {tuple(cu_tokens.shape)}"
        )
    if score.shape[0] >= 2**31:
        raise ValueError(f"expected fewer than 2**31 tokens, got {score.shape[0]}")
    if not score.dtype.is_floating_point:
        raise ValueError(f"expected a floating-point score, got {score.dtype}")
    if cu_tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected int32 or int64 cu_tokens, got {cu_tokens.dtype}")
    if cu_tokens.device not in (score.device, torch.device("cpu")):
        raise ValueError(
            f"expected cu_tokens on the CPU or with score on {score.device}, got {cu_tokens.device}"
        )


torch.library.define(
    "sepo::segment_topk",
    "(Tensor score, Tensor cu_tokens, float fraction, str side, int min_tokens, str impl)"
    " -> (Tensor, Tensor)",
)
_BY_NAME = {impl.name: impl for impl in IMPLS}


def _run(
    score: Tensor, cu_tokens: Tensor, fraction: float, side: str, min_tokens: int, impl: str
) -> tuple[Tensor, Tensor]:
    check_values("cu_tokens", cu_tokens, score.shape[0])
    return _BY_NAME[impl].fwd(score, cu_tokens, fraction, side, min_tokens)


def _fake(
    score: Tensor, cu_tokens: Tensor, fraction: float, side: str, min_tokens: int, impl: str
) -> tuple[Tensor, ...]:
    M = torch.library.get_ctx().new_dynamic_size()
    return tuple(score.new_empty((n,), dtype=torch.int32) for n in (M, cu_tokens.shape[0]))


torch.library.impl("sepo::segment_topk", ("cpu", "cuda"), _run)
torch.library.register_fake("sepo::segment_topk", _fake)
_fwd = torch.ops.sepo.segment_topk.default
