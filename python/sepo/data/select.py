"""Which positions of a response the loss uses (SePO, arXiv 2408.13518, section 3.2)."""

import zlib
from typing import Literal

import numpy as np

from sepo.errors import InputError


def select_positions(
    score: np.ndarray,  # (T,) float32, one score per response token, finite
    fraction: float,  # 0 < fraction <= 1
    side: Literal["highest", "lowest"],
    *,
    min_tokens: int = 1,
) -> np.ndarray:  # (K,) int32 ascending
    """Positions of the K highest (chosen) or lowest (rejected) scores; ties go to the earlier.

    K = max(min_tokens, floor(fraction * T + 1e-9)), at most T. Raises InputError for a NaN score
    or a fraction outside (0, 1].
    """
    if np.isnan(score).any():
        raise InputError(f"expected finite scores, got NaN at position {np.isnan(score).argmax()}")
    count = count_selected(len(score), fraction, min_tokens=min_tokens)
    order = np.argsort(-score if side == "highest" else score, kind="stable")
    return np.sort(order[:count]).astype(np.int32)


def random_positions(
    num_tokens: int,  # T
    fraction: float,  # 0 < fraction <= 1
    *,
    seed: int,
    key: str,  # names the response, e.g. "<pair id>/chosen"; the same key draws the same positions
    min_tokens: int = 1,
) -> np.ndarray:  # (K,) int32 ascending
    """SePO-rand: K positions uniformly at random, fixed by (seed, key) and nothing else."""
    count = count_selected(num_tokens, fraction, min_tokens=min_tokens)
    # crc32, not hash(): Python salts string hashes anew in every process
    rng = np.random.default_rng((seed, zlib.crc32(key.encode())))
    return np.sort(rng.choice(num_tokens, count, replace=False)).astype(np.int32)


def all_positions(num_tokens: int) -> np.ndarray:  # (T,) int32
    """Every response position: what DPO, SimPO and SFT use."""
    return np.arange(num_tokens, dtype=np.int32)


def weighted_positions(weight: np.ndarray) -> np.ndarray:  # (T,) float32 >= 0 -> (K,) int32
    """The positions to which a user's own mask or weights give something."""
    return np.flatnonzero(weight > 0).astype(np.int32)


def count_selected(num_tokens: int, fraction: float, *, min_tokens: int = 1) -> int:
    """K = max(min_tokens, floor(fraction * T + 1e-9)), never more than T."""
    if not 0 < fraction <= 1:
        raise InputError(f"expected 0 < fraction <= 1, got {fraction}")
    # 1e-9: 0.29 * 100 is 28.999999999999996 in floating point and means 29
    return min(num_tokens, max(min_tokens, int(fraction * num_tokens + 1e-9)))
