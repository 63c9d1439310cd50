"""From a pair to what a method reads of it: select, then truncate."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np

from sepo.data.pack import PackablePair
from sepo.data.selection import (
    FirstToken,
    Fraction,
    all_positions,
    random_mask,
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
    fraction: Fraction = 0.3,  # of a response's tokens, for "selected" and "random"
    rejected_fraction: Fraction | None = None,  # None: as `fraction`
    mass: float = 0.8,  # of the score, where a fraction is "mass"
    first_token: FirstToken = "paper",
    mask: Literal["random"] | None = None,  # a number in [0, 1) a used token, beside the weights
    seed: int = 0,  # of both "random"
) -> PackablePair:
    """The prompt and both responses, cut after their last used token.

    "selected": the highest scores of the chosen, the lowest of the rejected response, or what the
    user's own weights name; "random": as many tokens drawn by (seed, pair id); "all": every token
    that the user's weights, if any, leave in; "chosen": the same, and nothing of the rejected
    response. Raises InputError naming the row if what is asked for is not there.
    """
    if rejected_fraction is None:
        rejected_fraction = fraction
    how = dict(mass=mass, first_token=first_token, mask=mask, seed=seed)
    segment = partial(_segment, pair, positions=positions, **how)
    return (
        pair.prompt,
        segment("chosen", fraction=fraction),
        segment("rejected", fraction=rejected_fraction),
    )


def check_tokens(pair: TokenPair, vocabularies: Mapping[str, int]) -> None:
    """Raise InputError naming the row for a token that a model lacks; sizes by the model's role.

    Models that share a tokenizer may pad the vocabulary differently, so a tokenizer does not tell.
    """
    if not vocabularies:
        return
    ids = np.concatenate([pair.prompt, pair.chosen, pair.rejected])
    least, largest = int(ids.min(initial=0)), int(ids.max(initial=0))
    for role, size in vocabularies.items():
        if not 0 <= least <= largest < size:
            token = largest if largest >= size else least
            raise InputError(
                f"row {pair.id}: token {token}, but the {role} has a vocabulary of {size}; "
                "it needs the tokenizer that made the pairs"
            )


def num_tokens(pair: PackablePair) -> int:
    """Tokens the trunk reads for one packed pair."""
    prompt, chosen, rejected = pair
    return len(prompt) + len(chosen.response) + len(rejected.response)


def num_selected(pair: PackablePair) -> int:
    """Tokens the loss uses of one packed pair."""
    return len(pair[1].positions) + len(pair[2].positions)


def _segment(
    pair: TokenPair,
    side: str,
    *,
    positions: Positions,
    fraction: Fraction,
    mass: float,
    first_token: FirstToken,
    mask: str | None,
    seed: int,
) -> Segment:
    response: np.ndarray = getattr(pair, side)
    weight = getattr(pair, f"{side}_weight")
    kept = {name: getattr(pair, f"{side}_{name}", None) for name in ("ref_logp", "ref_hidden")}
    if positions == "chosen" and side == "rejected":
        where = np.empty(0, np.int32)
    elif weight is not None:
        if positions == "random":
            raise InputError(f"row {pair.id}: it brings its own {side} weights, nothing to draw")
        _check_weight(weight, pair, side)
        where = weighted_positions(weight)
    elif positions in ("all", "chosen"):
        where = all_positions(len(response))
    else:
        how = dict(fraction=fraction, mass=mass, first_token=first_token, seed=seed)
        where = _some_positions(pair, side, positions, **how)
    if mask == "random":
        kept["mask"] = random_mask(len(response), seed=seed, key=f"{pair.id}/{side}/mask")
    return truncate(response, where, weight=weight, **kept)


def _some_positions(
    pair: TokenPair,
    side: str,
    positions: Positions,
    *,
    fraction: Fraction,
    mass: float,
    first_token: FirstToken,
    seed: int,
) -> np.ndarray:  # (K,) int32
    score = getattr(pair, f"{side}_score", None)
    if positions == "selected" and score is None:
        raise InputError(
            f"row {pair.id}: expected a score per {side} token (`sepo score` writes them) "
            "or the user's own masks or weights"
        )
    try:
        if positions == "random":
            how = dict(seed=seed, key=f"{pair.id}/{side}", first_token=first_token)
            return random_positions(len(getattr(pair, side)), fraction, **how)
        best = "highest" if side == "chosen" else "lowest"
        return select_positions(score, fraction, best, mass=mass, first_token=first_token)
    except InputError as error:
        raise InputError(f"row {pair.id}, {side}: {error}") from error


def _check_weight(weight: np.ndarray, pair: TokenPair, side: str) -> None:
    """Columns are checked as they are read; pairs made by hand come here unread."""
    name = f"row {pair.id}: expected {side}_weight"
    if len(weight) != len(getattr(pair, side)):
        raise InputError(
            f"{name} to hold {len(getattr(pair, side))} numbers, one a token, got {len(weight)}"
        )
    if not (good := np.isfinite(weight) & (weight >= 0)).all():
        raise InputError(f"{name} to be finite and >= 0, got {weight[~good][0]}")
    if not weight.any():
        raise InputError(f"{name} to select a token, got zeros alone")
