"""Between (B, T) labels, where -100 means "not in the loss", and the rows of `selected_logprob`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepo.ops._checks import check_index_values, check_indices
from sepo.ops._selected_logprob import selected_logprob

UNUSED = -100  # what transformers' losses leave out


def logprob_from_labels(
    hidden: Tensor,  # (B, T, D) after the final norm
    weight: Tensor,  # (V, D), same dtype as hidden
    labels: Tensor,  # (B, T) int64 token ids, ignore_index where the loss looks away
    *,
    ignore_index: int = UNUSED,
    bias: Tensor | None = None,  # (V,), same dtype as hidden
    scale: float = 1.0,  # multiplies the logits before the bias
    softcap: float | None = None,  # logits = softcap * tanh(logits / softcap), as in Gemma 2
    budget: int | None = None,  # bytes of logits or probabilities alive at once
    impl: str = "auto",
) -> Tensor:  # (B, T) float32 nats, or float64 for float64 inputs
    """Return the log-probability of every label, where the label is, and no (B, T, V) tensor.

    The result at (b, t) is log p(labels[b, t] | hidden[b, t - 1]): the shift is made here. It is 0,
    and has no gradient, where the label is `ignore_index`, and at t = 0, which no state predicts.
    So `logp.sum(1)` are the sequences' log-probabilities, and masks of the labels' shape multiply
    it as they are. Only the rows that predict a label go through the head. Schedules, budget and
    autocast are as for `selected_logprob`. On a GPU this synchronises once, for the number of rows;
    under torch.compile that is a graph break.

    Args:
        hidden: (B, T, D) floating point, the states after the final norm.
        weight: (V, D), the head, in the dtype of hidden.
        labels: (B, T) int64 token ids, as transformers' losses take them: not shifted.
        ignore_index: the label of a token that is not used.
        bias: (V,) of the head, in the dtype of hidden.
        scale: multiplies the logits before the bias.
        softcap: logits = softcap * tanh(logits / softcap), as in Gemma 2; None: not.
        budget: bytes of logits or probabilities alive at once; None: by device.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        Tensor: (B, T) float32, or float64 for float64 inputs, natural logarithms; differentiable in
        hidden, weight and bias.

    Raises:
        ValueError: for shapes and dtypes that do not fit, a label on the CPU that is neither
            `ignore_index` nor a token id, and as `selected_logprob`.
    """
    if hidden.ndim != 3 or hidden.shape[:2] != labels.shape:
        raise ValueError(
            "expected hidden (B, T, D) and labels (B, T), "
            f"got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    rows, targets, _ = rows_from_labels(labels, ignore_index=ignore_index)
    logp = selected_logprob(
        hidden.flatten(0, 1), weight, rows, targets, bias=bias, scale=scale, softcap=softcap,
        budget=budget, impl=impl,
    )  # fmt: skip
    everywhere = logp.new_zeros(labels.numel())
    return everywhere.index_copy(0, rows.long() + 1, logp).view(labels.shape)


class LabelRows(NamedTuple):
    """Name the results of `rows_from_labels`.

    Attributes:
        rows: (M,) int32, ascending, into states (B, T, D) flattened to (B * T, D).
        targets: (M,) int64, the token ids that those states predict.
        cu_rows: (B + 1,) int32, from 0 to M: sequence b is segment b.
    """

    rows: Tensor  # (M,) int32
    targets: Tensor  # (M,) int64
    cu_rows: Tensor  # (B + 1,) int32


def rows_from_labels(
    labels: Tensor,  # (B, T) int64 token ids, ignore_index where the loss looks away
    *,
    ignore_index: int = UNUSED,
) -> LabelRows:  # rows (M,) int32, targets (M,) int64, cu_rows (B + 1,) int32
    """Return what `selected_logprob` takes for these labels.

    The usual shift is made here: the state at t - 1 predicts the label at t, so the label at 0 is
    never used. Sequences that alternate, chosen then rejected, make the segments of the losses. On
    a GPU this synchronises once, for M.

    Args:
        labels: (B, T) int64 token ids, as transformers' losses take them: not shifted.
        ignore_index: the label of a token that is not used.

    Returns:
        LabelRows: rows (M,) int32 into states (B, T, D) flattened to (B * T, D), targets (M,)
        int64, cu_rows (B + 1,) int32: sequence b is segment b.

    Raises:
        ValueError: for labels that are not (B, T) int64, or for 2**31 positions and more.
    """
    if labels.ndim != 2 or labels.dtype != torch.int64:
        raise ValueError(f"expected labels (B, T) int64, got {tuple(labels.shape)} {labels.dtype}")
    _check_size(*labels.shape)
    predicted = labels[:, 1:]  # (B, T - 1)
    used = predicted != ignore_index
    sequence, position = used.nonzero(as_tuple=True)  # in order, so segments are contiguous
    rows = (sequence * labels.shape[1] + position).int()
    cu_rows = F.pad(used.sum(1).cumsum(0), (1, 0)).int()
    return LabelRows(rows, predicted[sequence, position], cu_rows)


def labels_from_rows(
    rows: Tensor,  # (M,) int32 or int64 into the flattened (B * T, D) states
    targets: Tensor,  # (M,) int64
    *,
    shape: tuple[int, int],  # (B, T)
    ignore_index: int = UNUSED,
) -> Tensor:  # (B, T) int64, ignore_index where nothing is predicted
    """Return the labels that `rows_from_labels` turns into these rows and targets.

    Args:
        rows: (M,) int32 or int64, in any order, into states (B, T, D) flattened to (B * T, D).
        targets: (M,) int64 token ids.
        shape: (B, T).
        ignore_index: the label where nothing is predicted.

    Returns:
        Tensor: (B, T) int64.

    Raises:
        ValueError: for shapes and dtypes that do not fit and, on the CPU, for a row out of range,
            for one that is its sequence's last, which predicts nothing there, and for a row with
            two targets, as packed pairs have where they share a prompt: labels cannot say that.
    """
    B, T = shape
    _check_size(B, T)
    check_indices(rows, targets)
    if rows.device.type == "cpu" and len(rows):
        check_index_values(rows, targets[:0], B * T, 0)
        last = rows[rows % T == T - 1]
        if len(last):
            raise ValueError(f"expected rows that predict, got {last[0]}, the last of a sequence")
        found, times = rows.unique(return_counts=True)
        if len(found) < len(rows):
            row = found[times > 1][0]
            raise ValueError(f"expected one target a row, got {times.max()} at row {row}")
    labels = targets.new_full((B * T,), ignore_index)
    labels[rows.long() + 1] = targets
    return labels.view(B, T)


def _check_size(B: int, T: int) -> None:
    if B * T >= 2**31:
        raise ValueError(f"expected fewer than 2**31 positions, got {B} x {T}")
