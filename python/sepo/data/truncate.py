"""Drop every response token that no selected prediction depends on.

A causal model predicts response token t from the prompt and response tokens < t. After the last
selected position nothing is needed, not even that token itself: it is a target, never an input.
"""

import numpy as np

from sepo.data.hidden import HiddenRows
from sepo.data.types import Segment


def truncate(
    response: np.ndarray,  # (T,) int32
    positions: np.ndarray,  # (K,) int32 ascending; may be empty: nothing is read, nothing used
    *,
    weight: np.ndarray | None = None,  # (T,) float32, the user's weights
    ref_logp: np.ndarray | None = None,  # (T,) float32, the cached reference
    ref_hidden: HiddenRows | None = None,  # T rows, the same; none is read here
    mask: np.ndarray | None = None,  # (T,) float32, drawn at random
) -> Segment:
    """Keep response[:last selected position] and what belongs to the selected positions."""
    last = int(positions[-1]) if len(positions) else 0
    return Segment(
        response=response[:last],
        positions=positions,
        targets=response[positions].astype(np.int64),
        weights=None if weight is None else weight[positions],
        ref_logp=None if ref_logp is None else ref_logp[positions],
        ref_hidden=ref_hidden,
        mask=None if mask is None else mask[positions],
    )
