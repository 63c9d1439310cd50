"""One response as selection sees it: which tokens, how far into it, how much of the score."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from sepo.data.selection import count_selected
from sepo.data.types import TokenPair

SHOWN = (0.1, 0.3, 0.5)  # the shares whose tokens the page marks, as the paper's case studies do
USUAL = 1  # which of them the counts by place and by string are made for: the paper's k
GRID = tuple(percent / 100 for percent in range(1, 101))
NOT_SHOWN = len(SHOWN)  # level of a token that none of them selects


@dataclass(frozen=True, slots=True)
class Ranked:
    """A response's tokens, best first, ties to the earlier."""

    order: np.ndarray  # (T,) int64 positions
    gain: np.ndarray  # (T,) float32, the score; of a rejected response its negative

    def counts(self) -> np.ndarray:  # (100,) int64, tokens selected at each share of GRID
        return _counts(len(self.order))

    def ends(self) -> np.ndarray:  # (100,) int64, tokens up to and including the last selected
        return 1 + np.maximum.accumulate(self.order)[self.counts() - 1]

    def held(self) -> np.ndarray:  # (100,) float64, positive gain of the selected tokens, in nats
        positive = np.maximum(self.gain, 0)[self.order]
        return np.cumsum(positive, dtype=np.float64)[self.counts() - 1]

    def levels(self) -> np.ndarray:  # (T,) int8: the first of SHOWN that selects it, or NOT_SHOWN
        level = np.full(len(self.order), NOT_SHOWN, np.int8)
        for index in reversed(range(len(SHOWN))):
            level[self.order[: count_selected(len(level), SHOWN[index])]] = index
        return level


def rank(pair: TokenPair, side: str) -> Ranked | None:
    """By score; None where there is none, or where the user's own weights take its place."""
    score = getattr(pair, f"{side}_score", None)
    if score is None or getattr(pair, f"{side}_weight") is not None:
        return None
    gain = score if side == "chosen" else -score
    return Ranked(np.argsort(-gain, kind="stable"), gain)


def levels(pair: TokenPair, side: str) -> np.ndarray | None:
    """(T,) int8: by score or, where the user's own weights select, 0 and NOT_SHOWN; None: neither."""
    if (ranked := rank(pair, side)) is not None:
        return ranked.levels()
    weight = getattr(pair, f"{side}_weight")
    return None if weight is None else np.where(weight > 0, 0, NOT_SHOWN).astype(np.int8)


@cache
def _counts(num_tokens: int) -> np.ndarray:
    return np.array([count_selected(num_tokens, share) for share in GRID])
