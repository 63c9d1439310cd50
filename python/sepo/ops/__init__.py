"""The operations of the training step, usable on their own in any PyTorch program."""

from sepo.losses import (
    dpo_loss,
    dpop_loss,
    ipo_loss,
    rrhf_loss,
    sepo_loss,
    simpo_loss,
    sparsepo_loss,
    tdpo_loss,
)
from sepo.ops import _flops  # noqa: F401  registers the FLOP formulas
from sepo.ops._high_entropy import HighEntropyRows, high_entropy_rows
from sepo.ops._k_targets import sampled_first
from sepo.ops._labels import LabelRows, labels_from_rows, logprob_from_labels, rows_from_labels
from sepo.ops._segment_reduce import segment_mean, segment_sum
from sepo.ops._segment_topk import SegmentTopk, segment_topk
from sepo.ops._selected_logprob import Explanation, explain_selected_logprob, selected_logprob
from sepo.ops._selected_logprob_kl import (
    LogprobKL,
    explain_selected_logprob_kl,
    selected_logprob_kl,
)
from sepo.ops._selected_stats import SelectedStats, explain_selected_stats, selected_stats
from sepo.ops._split_linear import (
    SplitExplanation,
    SplitWeight,
    explain_split_linear,
    split_linear,
    split_logprob,
    split_weight,
)

__all__ = [
    "Explanation",
    "HighEntropyRows",
    "LabelRows",
    "LogprobKL",
    "SegmentTopk",
    "SelectedStats",
    "SplitExplanation",
    "SplitWeight",
    "dpo_loss",
    "dpop_loss",
    "explain_selected_logprob",
    "explain_selected_logprob_kl",
    "explain_selected_stats",
    "explain_split_linear",
    "high_entropy_rows",
    "ipo_loss",
    "labels_from_rows",
    "logprob_from_labels",
    "rows_from_labels",
    "rrhf_loss",
    "sampled_first",
    "segment_mean",
    "segment_sum",
    "segment_topk",
    "selected_logprob",
    "selected_logprob_kl",
    "selected_stats",
    "sepo_loss",
    "simpo_loss",
    "sparsepo_loss",
    "split_linear",
    "split_logprob",
    "split_weight",
    "tdpo_loss",
]
