"""high_entropy_rows: the rows whose next token is most open, found before any gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from sepo.ops._segment_topk import segment_topk
from sepo.ops._selected_stats import SelectedStats, selected_stats
from sepo_kernels.scales import Scale


class HighEntropyRows(NamedTuple):
    """Name the results of `high_entropy_rows`.

    Attributes:
        indices: (K,) int32 into rows and targets, ascending: those that are kept.
        cu_rows: (S + 1,) int32, from 0 to K: segment s has indices[cu_rows[s] : cu_rows[s + 1]].
        stats: of all M rows, without gradients.
    """

    indices: Tensor  # (K,) int32
    cu_rows: Tensor  # (S + 1,) int32
    stats: SelectedStats  # (M,) each


def high_entropy_rows(
    hidden: Tensor,  # (N, D) after the final norm
    weight: Tensor,  # (V, D), same dtype as hidden
    rows: Tensor,  # (M,) int32 or int64, 0 <= rows < N, may repeat
    targets: Tensor,  # (M,) int64, 0 <= targets < V
    *,
    fraction: float = 0.2,  # of the rows that are kept
    cu_rows: Tensor | None = None,  # (S + 1,) from 0 to M: a fraction of each segment; None: of all
    bias: Tensor | None = None,  # (V,), same dtype as hidden
    scale: Scale = 1.0,  # multiplies the logits before the bias: a number, or (M,), one a row
    softcap: float | None = None,  # logits = softcap * tanh(logits / softcap)
    budget: int | None = None,  # bytes of logits alive at once; None: by device
    impl: str = "auto",
) -> HighEntropyRows:
    """Return which rows have the highest entropy, and the statistics of all, in one GEMM.

    "Beyond the 80/20 Rule" (arXiv 2506.01939) gives the policy gradient to the fifth of a batch's
    tokens with the highest entropy. A loop that masks its loss multiplies the head with all rows
    three times or four. Here all rows are multiplied once without a gradient, and
    `selected_logprob` of the fifth that is kept takes 3 GEMMs of a fifth: 1.6 together.

        kept = ops.high_entropy_rows(hidden, weight, rows, targets)
        i = kept.indices.long()
        logp = ops.selected_logprob(hidden, weight, rows[i], targets[i])

    kept.stats.logp has the log-probabilities of all rows, such as the ratio's denominator of a
    first step. Ties go to the earlier row. Nothing synchronises but for a cu_rows on a GPU.

    Args:
        hidden: (N, D) floating point with contiguous rows, the states after the final norm.
        weight: (V, D) with contiguous rows, the head, in the dtype of hidden.
        rows: (M,) int32 or int64, 0 <= rows < N, may repeat: the states that predict.
        targets: (M,) int64, 0 <= targets < V: the token ids that they predict.
        fraction: how many rows are kept, in (0, 1]: as `segment_topk` rounds it, one at least.
        cu_rows: (S + 1,) int32 or int64, from 0 to M: the fraction is of each segment's rows;
            None: of all rows, as in the paper.
        bias: (V,) of the head, in the dtype of hidden.
        scale: multiplies the logits before the bias: a number, or (M,), one a row.
        softcap: logits = softcap * tanh(logits / softcap); None: not.
        budget: bytes of logits alive at once; None: by device.
        impl: of `selected_stats`: "auto", "native", "chunked".

    Returns:
        HighEntropyRows: indices (K,) int32, ascending, cu_rows (S + 1,) int32, stats (M,) each.

    Raises:
        ValueError: as `selected_stats` and `segment_topk`.
        torch.OutOfMemoryError: as `selected_logprob`.
    """
    with torch.no_grad():
        stats = selected_stats(
            hidden, weight, rows, targets, bias=bias, scale=scale, softcap=softcap, budget=budget,
            impl=impl,
        )  # fmt: skip
        if cu_rows is None:
            cu_rows = torch.tensor([0, len(rows)], dtype=torch.int32)
        kept = segment_topk(stats.entropy, cu_rows, fraction, "highest")
    return HighEntropyRows(*kept, stats)
