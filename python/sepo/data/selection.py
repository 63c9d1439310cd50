"""Which positions of a response the loss uses (SePO, arXiv 2408.13518, section 3.2)."""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sepo.errors import InputError

Fraction = float | Literal["mass"]  # how many: a share of the tokens, or of the score they hold
FirstToken = Literal["paper", "released"]  # which was "official", and may be
Positions = Literal["selected", "random", "all", "chosen"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tokens of a pair the loss uses: made once, of flags or by hand, and carried whole.

    positions: "selected", the highest scores of the chosen and the lowest of the rejected response,
    or what the user's own weights name; "random", as many tokens drawn by (seed, pair id); "all",
    every token that the user's weights, if any, leave in; "chosen", the same, and nothing of the
    rejected response.
    """

    positions: Positions
    fraction: Fraction = 0.3  # of a response's tokens, for "selected" and "random"
    rejected_fraction: Fraction | None = None  # None: as `fraction`
    mass: float = 0.8  # of the score, where a fraction is "mass"
    first_token: FirstToken = "paper"
    mask: Literal["random"] | None = None  # a number in [0, 1) a used token, beside the weights
    seed: int = 0  # of both "random"

    def fraction_of(self, side: str) -> Fraction:
        """The share of a chosen response, or of a rejected one."""
        own = self.rejected_fraction if side == "rejected" else None
        return self.fraction if own is None else own

    def by_score(self, score: np.ndarray, side: str) -> np.ndarray:  # (T,) float32 -> (K,) int32
        """Positions of a chosen response's highest scores, or of a rejected one's lowest."""
        return select_positions(
            score,
            self.fraction_of(side),
            "lowest" if side == "rejected" else "highest",
            mass=self.mass,
            first_token=self.first_token,
        )

    def by_chance(self, num_tokens: int, side: str, pair_id: str) -> np.ndarray:  # (K,) int32
        """As many positions as `by_score`, drawn by the seed and the pair's id."""
        return random_positions(
            num_tokens,
            self.fraction_of(side),
            seed=self.seed,
            key=f"{pair_id}/{side}",
            first_token=self.first_token,
        )


def select_positions(
    score: np.ndarray,  # (T,) float32, one score per response token, finite
    fraction: Fraction,  # 0 < fraction <= 1, or "mass"
    side: Literal["highest", "lowest"],
    *,
    mass: float = 0.8,  # 0 < mass <= 1, of "mass"
    first_token: FirstToken = "paper",  # "released": as the released code, never the first of many
    min_tokens: int = 1,
) -> np.ndarray:  # (K,) int32 ascending
    """Positions of the K highest (chosen) or lowest (rejected) scores; ties go to the earlier.

    K is `count_selected`'s; for "mass" the fewest tokens that hold that share of the sum of the
    positive (lowest: negative) scores, and one, the best, where there are none. Raises InputError
    for a NaN score, or a fraction or mass outside (0, 1].
    """
    if np.isnan(score).any():
        raise InputError(f"expected finite scores, got NaN at position {np.isnan(score).argmax()}")
    skip = _first_candidate(len(score), first_token)
    gain = score[skip:] if side == "highest" else -score[skip:]
    best_first = np.argsort(-gain, kind="stable")
    if fraction == "mass":
        count = max(min_tokens, _count_of_mass(gain[best_first], mass))
    else:
        count = count_selected(len(score), fraction, first_token=first_token, min_tokens=min_tokens)
    return np.sort(skip + best_first[:count]).astype(np.int32)


def random_positions(
    num_tokens: int,  # T
    fraction: Fraction,  # 0 < fraction <= 1; "mass" is refused: it needs scores
    *,
    seed: int,
    key: str,  # names the response, e.g. "<pair id>/chosen"; the same key draws the same positions
    first_token: FirstToken = "paper",  # the candidates and the count are those of the scores
    min_tokens: int = 1,
) -> np.ndarray:  # (K,) int32 ascending
    """SePO-rand: K positions uniformly at random, fixed by (seed, key) and nothing else."""
    count = count_selected(num_tokens, fraction, first_token=first_token, min_tokens=min_tokens)
    skip = _first_candidate(num_tokens, first_token)
    drawn = _rng(seed, key).choice(num_tokens - skip, count, replace=False)
    return np.sort(skip + drawn).astype(np.int32)


def random_mask(
    num_tokens: int,  # T
    *,
    seed: int,
    key: str,  # as in `random_positions`
) -> np.ndarray:  # (T,) float32 in [0, 1)
    """SparsePO's ablation: a number a token, uniform, fixed by (seed, key) and nothing else."""
    return _rng(seed, key).random(num_tokens, dtype=np.float32)


def all_positions(num_tokens: int) -> np.ndarray:  # (T,) int32
    """Every response position: what DPO, SimPO and SFT use."""
    return np.arange(num_tokens, dtype=np.int32)


def weighted_positions(weight: np.ndarray) -> np.ndarray:  # (T,) float32 >= 0 -> (K,) int32
    """The positions to which a user's own mask or weights give something."""
    return np.flatnonzero(weight > 0).astype(np.int32)


def count_selected(
    num_tokens: int,  # T
    fraction: Fraction,  # 0 < fraction <= 1; "mass" is refused: it needs scores
    *,
    first_token: FirstToken = "paper",
    min_tokens: int = 1,
) -> int:
    """K = max(min_tokens, floor(fraction * T + 1e-9)), never more than T.

    "released": T - 1 in place of T and no 1e-9, but a response of one token keeps it: the released
    code selects nothing of a short response and divides by zero.
    """
    if fraction == "mass" or not 0 < fraction <= 1:
        raise InputError(f"expected 0 < fraction <= 1, got {fraction}")
    candidates = num_tokens - _first_candidate(num_tokens, first_token)
    # 1e-9: 0.29 * 100 is 28.999999999999996 in floating point and means 29
    count = int(fraction * candidates + (1e-9 if first_token == "paper" else 0))
    return min(candidates, max(min_tokens, count))


def _first_candidate(num_tokens: int, first_token: FirstToken) -> int:
    return 1 if first_token in ("released", "official") and num_tokens > 1 else 0


def _count_of_mass(gain: np.ndarray, mass: float) -> int:  # (T,) float32 descending
    if not 0 < mass <= 1:
        raise InputError(f"expected 0 < mass <= 1, got {mass}")
    held = np.cumsum(np.maximum(gain, 0), dtype=np.float64)  # (T,) by the first t + 1 tokens
    # scores are float32: 0.7 of 0.7 + 0.1 + 0.1 + 0.1 must be one token, though 0.7 was rounded
    enough = mass * held[-1] * (1 - np.finfo(np.float32).eps)
    return int(np.searchsorted(held, enough)) + 1


def _rng(seed: int, key: str) -> np.random.Generator:
    # crc32, not hash(): Python salts string hashes anew in every process
    return np.random.default_rng((seed, zlib.crc32(key.encode())))
