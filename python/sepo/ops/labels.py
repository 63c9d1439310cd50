"""Between (B, T) labels, where -100 means "not in the loss", and the rows of `selected_logprob`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepo.ops.checks import check_index_values, check_indices

UNUSED = -100  # what transformers' losses leave out


class LabelRows(NamedTuple):
    """What `selected_logprob` and the segment operations take."""

    rows: Tensor  # (M,) int32 into the flattened (B * T, D) states
    targets: Tensor  # (M,) int64
    cu_rows: Tensor  # (B + 1,) int32, from 0 to M: sequence b is segment b


def rows_from_labels(
    labels: Tensor,  # (B, T) int64 token ids, ignore_index where the loss looks away
    *,
    ignore_index: int = UNUSED,
) -> LabelRows:  # rows (M,) int32, targets (M,) int64, cu_rows (B + 1,) int32
    """What `selected_logprob` takes, for states (B, T, D) flattened to (B * T, D); sequence b is
    segment b.

    The usual shift is made here: the state at t - 1 predicts the label at t, so the label at 0 is
    never used. Sequences that alternate, chosen then rejected, make the segments of the losses. On
    a GPU this waits once, for M. Raises ValueError for labels that are not (B, T) int64, or for
    2**31 positions and more.
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
    """The labels that `rows_from_labels` turns into these rows and targets.

    Raises ValueError for shapes and dtypes that do not fit and, on the CPU, for a row out of range,
    for one that is its sequence's last, which predicts nothing there, and for a row with two
    targets, as packed pairs have where they share a prompt: labels cannot say that.
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
