"""From a pair to what a method reads of it: select, then truncate."""

from typing import Literal

import numpy as np

from sepo.data.pack import PackablePair
from sepo.data.select import (
    all_positions,
    random_positions,
    select_positions,
    weighted_positions,
)
from sepo.data.truncate import truncate
from sepo.data.types import Segment, TokenPair
from sepo.errors import InputError

Positions = Literal["selected", "random", "all", "chosen"]


def make_segments(
    pair: TokenPair,  # a ScoredPair where positions are "selected"
    positions: Positions,
    *,
    fraction: float = 0.3,  # of a response's tokens, for "selected" and "random"
    rejected_fraction: float | None = None,  # None: as `fraction`
    seed: int = 0,  # of "random"
) -> PackablePair:
    """The prompt and both responses, cut after their last used token.

    "selected": the highest scores of the chosen, the lowest of the rejected response, or what the
    user's own weights name; "random": as many tokens drawn by (seed, pair id); "all": every token
    that the user's weights, if any, leave in; "chosen": the same, and nothing of the rejected
    response. Raises InputError naming the row if what is asked for is not there.
    """
    return (
        pair.prompt,
        _segment(pair, "chosen", positions, fraction, seed),
        _segment(pair, "rejected", positions, rejected_fraction or fraction, seed),
    )


def num_tokens(pair: PackablePair) -> int:
    """Tokens the trunk reads for one packed pair."""
    prompt, chosen, rejected = pair
    return len(prompt) + len(chosen.response) + len(rejected.response)


def num_selected(pair: PackablePair) -> int:
    """Tokens the loss uses of one packed pair."""
    return len(pair[1].positions) + len(pair[2].positions)


def _segment(
    pair: TokenPair, side: str, positions: Positions, fraction: float, seed: int
) -> Segment:
    response: np.ndarray = getattr(pair, side)
    weight = getattr(pair, f"{side}_weight")
    kept = {name: getattr(pair, f"{side}_{name}", None) for name in ("ref_logp", "ref_hidden")}
    if positions == "chosen" and side == "rejected":
        where = np.empty(0, np.int32)
    elif positions == "random":
        if weight is not None:
            raise InputError(f"row {pair.id}: it brings its own {side} weights, nothing to draw")
        where = random_positions(len(response), fraction, seed=seed, key=f"{pair.id}/{side}")
    elif weight is not None:
        where = weighted_positions(weight)
    elif positions == "selected":
        where = _by_score(pair, side, fraction)
    else:
        where = all_positions(len(response))
    return truncate(response, where, weight=weight, **kept)


def _by_score(pair: TokenPair, side: str, fraction: float) -> np.ndarray:
    score = getattr(pair, f"{side}_score", None)
    if score is None:
        raise InputError(
            f"row {pair.id}: expected a score per {side} token (`sepo score` writes them) "
            "or the user's own masks or weights"
        )
    try:
        return select_positions(score, fraction, "highest" if side == "chosen" else "lowest")
    except InputError as error:
        raise InputError(f"row {pair.id}, {side}: {error}") from error
