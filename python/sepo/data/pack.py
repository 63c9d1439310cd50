"""Lay pairs end to end: [prompt | chosen | rejected], the prompt once, no padding.

The packer owns the shift: it says which row predicts which target, and nothing after it does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sepo.data.hidden import HiddenRows
from sepo.data.types import PackedBatch, Segment


def pack(
    pairs: Sequence[tuple[np.ndarray, Segment, Segment]],  # each a CutPair, or like one
    *,
    vocab_size: int | None = None,  # checks every token against it when given
) -> PackedBatch:
    """Pack pairs, in order, into one buffer on the CPU.

    No pairs at all give a buffer of one token that no row reads: a rank without work still runs
    the model, so that collectives match. Raises ValueError for an index out of range; nothing
    downstream checks again, because on a device that would wait.
    """
    tokens, position_ids, rows, targets, weights = [], [], [], [], []
    ref_logp, ref_hidden, mask = [], [], []
    spans, cu_rows = [], [0]
    start = 0  # buffer index of this pair's first token
    for prompt, chosen, rejected in pairs:
        if len(prompt) == 0:
            raise ValueError("expected a prompt of at least one token: its last row predicts")
        first = start + len(prompt)  # buffer index of the first response token
        rejected_start = first + len(chosen.response)
        end = rejected_start + len(rejected.response)
        spans.append((start, first, rejected_start, end))
        tokens += [prompt, chosen.response, rejected.response]
        position_ids.append(np.arange(len(prompt)))
        for segment, segment_start in ((chosen, first), (rejected, rejected_start)):
            _check_segment(segment)
            position_ids.append(len(prompt) + np.arange(len(segment.response)))
            # the state before position t predicts t; before position 0 is the prompt's last state
            row = segment_start + segment.positions - 1
            rows.append(np.where(segment.positions == 0, first - 1, row))
            targets.append(segment.targets)
            weights.append(_or_ones(segment))
            ref_logp.append(segment.ref_logp)
            ref_hidden.append((segment.ref_hidden, segment.positions))
            mask.append(segment.mask)
            cu_rows.append(cu_rows[-1] + len(segment.positions))
        start = end
    if not pairs:
        tokens, position_ids = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    if vocab_size is not None:
        _check_vocabulary([*tokens, *targets], vocab_size)

    int32: dict[str, Any] = dict(dtype=torch.int32)
    return PackedBatch(
        tokens=_flat(tokens, torch.int64),
        position_ids=_flat(position_ids, torch.int64),
        prefix_end=torch.tensor([span[1] for span in spans], **int32),
        rejected_start=torch.tensor([span[2] for span in spans], **int32),
        pair_end=torch.tensor([span[3] for span in spans], **int32),
        rows=_flat(rows, torch.int32),
        targets=_flat(targets, torch.int64),
        cu_rows=torch.tensor(cu_rows, **int32),
        weights=_flat(weights, torch.float32),
        ref_logp=_flat_if_all(ref_logp),
        ref_hidden=_read_hidden(ref_hidden),
        mask=_flat_if_all(mask),
        spans=tuple(spans),
    )


def _check_segment(segment: Segment) -> None:
    positions = segment.positions
    if len(positions) == 0:
        return
    if positions[0] < 0 or (np.diff(positions) <= 0).any():
        raise ValueError(f"expected ascending positions >= 0, got {positions.tolist()}")
    if positions[-1] > len(segment.response):
        raise ValueError(
            f"position {positions[-1]} is predicted by response token {positions[-1] - 1}, "
            f"but the segment keeps {len(segment.response)} tokens"
        )


def _check_vocabulary(parts: list[np.ndarray], vocab_size: int) -> None:
    ids = np.concatenate(parts)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"expected token ids in [0, {vocab_size}), got {ids.min()} to {ids.max()}: "
            "the data was tokenised for another model"
        )


def _or_ones(segment: Segment) -> np.ndarray:
    if segment.weights is None:
        return np.ones(len(segment.positions), np.float32)
    return segment.weights


def _read_hidden(
    segments: list[tuple[HiddenRows | None, np.ndarray]],
) -> torch.Tensor | None:  # (M, D_ref) bfloat16
    kept = [(rows, positions) for rows, positions in segments if rows is not None]
    # without a segment nobody knows D_ref
    if not kept or len(kept) < len(segments):
        return None
    return torch.cat([rows.read(positions) for rows, positions in kept])


def _flat_if_all(parts: list[np.ndarray | None]) -> torch.Tensor | None:  # (M,) float32
    there = [part for part in parts if part is not None]
    return _flat(there, torch.float32) if len(there) == len(parts) else None


def _flat(parts: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.empty(0, dtype=dtype)
    )
