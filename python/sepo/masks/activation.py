"""MaPO's mask: the reference's own activations, normalised over the tokens of a response."""

from typing import Literal

import torch
from torch import Tensor

from sepo.masks.segments import segment_of
from sepo.ops import segment_mean


def activation_mask(
    activations: Tensor,  # (G, M) float32, what `layer_activations` reads
    cu_rows: Tensor,  # (S + 1,) int32, from 0 to M
    *,
    norm: Literal["minmax", "zscore"] = "minmax",
) -> Tensor:  # (M,) float32
    """Each activation normalised over its response's rows, then the mean over the G activations.

    The rows of a response are its used tokens: all of them, unless the user's weights leave some out.
    minmax, (a - min) / (max - min), lies in [0, 1]; zscore, (a - mean) / deviation (that of all
    the response's tokens: divided by their number), is negative for about half of them. An
    activation that is the same for all tokens of a response gives 1 there; so does the only token
    of one. Raises ValueError for another `norm`.
    """
    if norm not in ("minmax", "zscore"):
        raise ValueError(f"expected norm minmax or zscore, got {norm!r}")
    G, M = activations.shape
    num_segments = len(cu_rows) - 1
    segment = segment_of(cu_rows, M).expand(G, M)

    def extreme(which: str) -> Tensor:  # (G, M): of the token's own segment
        start = activations.new_zeros(G, num_segments)
        extremes = start.scatter_reduce(1, segment, activations, which, include_self=False)
        return extremes.gather(1, segment)

    def mean(values: Tensor) -> Tensor:  # (G, M): of the token's own segment
        offsets = torch.arange(G, device=cu_rows.device)[:, None] * M + cu_rows[:-1]
        end = offsets.new_full((1,), G * M)
        means = segment_mean(values.flatten(), torch.cat([offsets.flatten(), end]))
        return means.view(G, num_segments).gather(1, segment)

    least, most = extreme("amin"), extreme("amax")
    unit = (activations - least) / (most - least)
    if norm == "zscore":  # of the numbers in [0, 1]: it is the same, and no square underflows
        centred = unit - mean(unit)
        unit = centred / mean(centred.square()).sqrt()
    # compared exactly: rounding would give a constant a deviation, and noise be divided by it
    return torch.where(most == least, 1.0, unit).mean(0)
