"""From a pair to what a method reads of it: select, then truncate."""

from collections.abc import Mapping

import numpy as np

from sepo.data.selection import (
    Selection,
    all_positions,
    random_mask,
    weighted_positions,
)
from sepo.data.truncate import truncate
from sepo.data.types import CutPair, Segment, TokenPair
from sepo.errors import InputError


def make_segments(
    pair: TokenPair,  # a ScoredPair where the scores select
    selection: Selection,
) -> CutPair:
    """Select the tokens that the loss uses, and cut each response after the last of them.

    Raises InputError naming the row if what is asked for is not there.
    """
    return CutPair(
        pair.prompt, _segment(pair, "chosen", selection), _segment(pair, "rejected", selection)
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
                f"pair {pair.id}: token {token}, but the {role} has a vocabulary of {size}; "
                "it needs the tokenizer that made the pairs"
            )


def num_tokens(pair: CutPair) -> int:
    """Tokens the trunk reads for one packed pair."""
    prompt, *responses = pair
    return len(prompt) + sum(len(segment.response) for segment in responses)


def num_selected(pair: CutPair) -> int:
    """Tokens the loss uses of one packed pair."""
    return sum(len(segment.positions) for segment in pair[1:])


def _segment(pair: TokenPair, side: str, selection: Selection) -> Segment:
    response: np.ndarray = getattr(pair, side)
    weight = getattr(pair, f"{side}_weight")
    kept = {name: getattr(pair, f"{side}_{name}", None) for name in ("ref_logp", "ref_hidden")}
    if selection.positions == "chosen" and side == "rejected":
        where = np.empty(0, np.int32)
    elif weight is not None:
        if selection.positions == "random":
            raise InputError(f"pair {pair.id}: it brings its own {side} weights, nothing to draw")
        _check_weight(weight, pair, side)
        where = weighted_positions(weight)
    elif selection.positions in ("all", "chosen"):
        where = all_positions(len(response))
    else:
        where = _some_positions(pair, side, selection)
    if selection.mask == "random":
        key = f"{pair.id}/{side}/mask"
        kept["mask"] = random_mask(len(response), seed=selection.seed, key=key)
    return truncate(response, where, weight=weight, **kept)


def _some_positions(pair: TokenPair, side: str, selection: Selection) -> np.ndarray:  # (K,) int32
    score: np.ndarray | None = getattr(pair, f"{side}_score", None)
    try:
        if selection.positions == "random":
            return selection.by_chance(len(getattr(pair, side)), side, pair.id)
        if score is not None:
            return selection.by_score(score, side)
    except InputError as error:
        raise InputError(f"pair {pair.id}, {side}: {error}") from error
    raise InputError(
        f"pair {pair.id}: expected a score per {side} token (`sepo score` writes them) "
        "or the user's own masks or weights"
    )


def _check_weight(weight: np.ndarray, pair: TokenPair, side: str) -> None:
    """Columns are checked as they are read; pairs made by hand come here unread."""
    name = f"pair {pair.id}: expected {side}_weight"
    if len(weight) != len(getattr(pair, side)):
        raise InputError(
            f"{name} to hold {len(getattr(pair, side))} numbers, one a token, got {len(weight)}"
        )
    if not (good := np.isfinite(weight) & (weight >= 0)).all():
        raise InputError(f"{name} to be finite and >= 0, got {weight[~good][0]}")
    if not weight.any():
        raise InputError(f"{name} to select a token, got zeros alone")
