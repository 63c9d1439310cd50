"""Everything a report shows, as plain data: lists, dicts, numbers and strings, ready for JSON."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sepo
from sepo.data.store.store import ScoredStore
from sepo.data.types import ScoredPair
from sepo.errors import InputError
from sepo.report.ranks import GRID, SHOWN, USUAL, levels
from sepo.report.runs import read_run
from sepo.report.scored import SIDES, describe_store, histograms, same_tokens
from sepo.report.texts import TokenTexts

MAX_STORES = 2
PAIRS = 500  # a thousand responses: about 2 MB of page


def collect(
    stores: Sequence[str | os.PathLike] = (),
    tokenizers: Sequence[Any] = (),  # one a store
    runs: Sequence[str | os.PathLike] = (),
    *,
    max_pairs: int = PAIRS,  # whose responses are shown token by token, from the first on
) -> dict:
    """Read up to two scored stores and any number of training runs.

    Scores are in nats, of the responses with three significant digits; shares lie in [0, 1].
    Raises InputError with nothing to report, with more than two stores, for `max_pairs` below 0,
    as `ScoredStore.open` does, for a store without scores and weights, and for a folder that is
    no run.
    """
    if not stores and not runs:
        raise InputError("expected a scored store or a run to report, got neither")
    if len(stores) > MAX_STORES:
        raise InputError(f"expected at most {MAX_STORES} stores, got {len(stores)}")
    if max_pairs < 0:
        raise InputError(f"expected --pairs >= 0, got {max_pairs}")
    opened = [ScoredStore.open(p, t) for p, t in zip(stores, tokenizers, strict=True)]
    texts = [TokenTexts(tokenizer) for tokenizer in tokenizers]
    names = [os.fspath(path) for path in stores]
    described = [describe_store(*each) for each in zip(opened, names, texts, strict=True)]
    about = [one for one, _ in described]
    of_scores = histograms([scores for _, scores in described])
    for one, histogram in zip(about, of_scores, strict=True):
        one["histogram"] = histogram
    strings: dict[str, int] = {}
    return {
        "sepo": sepo.__version__,
        "shares": list(GRID),  # of by_share and read
        "shown": list(SHOWN),  # a response's levels are places in it, the next one for "not in any"
        "usual": SHOWN[USUAL],  # the share of by_place and by_string
        "stores": about,
        "same_tokens": same_tokens(opened) if len(opened) == 2 else None,
        "runs": [read_run(Path(run), os.fspath(run)) for run in runs],
        "pairs": _pairs(opened, texts, max_pairs, strings),
        "strings": list(strings),  # what the responses' token numbers stand for
    }


def _pairs(
    stores: Sequence[ScoredStore],
    texts: Sequence[TokenTexts],
    max_pairs: int,
    strings: dict[str, int],  # filled
) -> list[dict]:
    if not stores:
        return []
    rows = [{pair.id: i for i, pair in enumerate(store.pairs())} for store in stores[1:]]
    pairs = []
    for index in range(min(max_pairs, len(stores[0]))):
        first = stores[0][index]
        others = [
            s[r[first.id]] if first.id in r else None for s, r in zip(stores[1:], rows, strict=True)
        ]
        responses = []
        for pair, text in zip([first, *others], texts, strict=True):
            sides = {side: pair and _response(pair, side, text, strings) for side in SIDES}
            responses.append(sides)
        prompt = texts[0].whole(first.prompt)
        pairs.append({"id": first.id, "prompt": prompt, "responses": responses})
    return pairs


def _response(pair: ScoredPair, side: str, texts: TokenTexts, strings: dict[str, int]) -> dict:
    score, level = getattr(pair, f"{side}_score"), levels(pair, side)
    each = texts.each(getattr(pair, side))
    return {
        "tokens": [strings.setdefault(text, len(strings)) for text in each],
        "score": None if score is None else [float(f"{value:.3g}") for value in score.tolist()],
        "level": None if level is None else "".join(map(str, level.tolist())),
    }
