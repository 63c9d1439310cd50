"""Summarise a scored store: shares in [0, 1], scores in nats, lengths in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sepo.data.store.manifest import arithmetic_of
from sepo.data.store.store import ScoredStore
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.report.ranks import GRID, SHOWN, USUAL, levels, rank
from sepo.report.texts import TokenTexts

SIDES = ("chosen", "rejected")
PLACES = 20  # parts that a response is divided into, to count where in it tokens are selected
BINS = 48
MOST = 20  # token strings listed a side
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
MODELS = ("oracle", "reference")


@dataclass
class Side:
    """Sums over one side's responses."""

    ids: list[np.ndarray] = field(default_factory=list)  # each (T,) int32
    levels: list[np.ndarray] = field(default_factory=list)  # each (T,) int8
    scores: list[np.ndarray] = field(default_factory=list)  # each (T,) float32, if it has any
    ranked: int = 0  # responses selected by score
    ranked_tokens: int = 0  # theirs
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID), np.int64))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID), np.int64))
    held: np.ndarray = field(default_factory=lambda: np.zeros(len(GRID)))  # nats

    def add(self, pair: TokenPair, side: str) -> None:
        level = levels(pair, side)
        if level is None:
            return
        self.ids.append(getattr(pair, side))
        self.levels.append(level)
        if (ranked := rank(pair, side)) is not None:
            self.scores.append(getattr(pair, f"{side}_score"))
            self.ranked += 1
            self.ranked_tokens += len(level)
            self.counts += ranked.counts()
            self.ends += ranked.ends()
            self.held += ranked.held()

    def by_share(self) -> dict | None:
        """At each share of GRID: tokens selected, tokens up to the last of them, score held."""
        if not self.ranked:
            return None
        total = self.held[-1] or 1.0  # no positive score anywhere: nothing is held
        return {
            "selected": (self.counts / self.ranked_tokens).tolist(),
            "kept": (self.ends / self.ranked_tokens).tolist(),
            "length": (self.ends / self.ranked).tolist(),
            "held": (self.held / total).tolist(),
        }

    def by_place(self) -> list[float | None]:
        """Share selected at each of PLACES equal parts of a response; None: no token lies there."""
        every, selected = np.zeros((2, PLACES), np.int64)
        for level in self.levels:
            place = (np.arange(len(level)) * 2 + 1) * PLACES // (2 * len(level))
            every += np.bincount(place, minlength=PLACES)
            selected += np.bincount(place[level <= USUAL], minlength=PLACES)
        return [
            s / n if n else None for s, n in zip(selected.tolist(), every.tolist(), strict=True)
        ]

    def by_string(self, texts: TokenTexts) -> list[dict]:
        """The token strings selected most often, with how often they occur at all."""
        if not self.ids:
            return []
        ids = np.concatenate(self.ids)
        is_selected = np.concatenate(self.levels) <= USUAL
        every = np.bincount(ids)
        selected = np.bincount(ids[is_selected], minlength=len(every))
        most = np.argsort(-selected, kind="stable")[:MOST]
        return [
            {"token": texts.one(int(i)), "selected": int(selected[i]), "all": int(every[i])}
            for i in most
            if selected[i]
        ]

    def all_scores(self) -> np.ndarray:  # (tokens,) float32
        return np.concatenate(self.scores) if self.scores else np.empty(0, np.float32)


def describe_store(store: ScoredStore, name: str, texts: TokenTexts) -> tuple[dict, tuple]:
    """A store's numbers but for its histogram, and its scores, chosen and rejected, for that.

    Raises InputError for a store with neither scores nor weights.
    """
    sides = {side: Side() for side in SIDES}
    for pair in store.pairs():
        for side in SIDES:
            sides[side].add(pair, side)
    if not any(side.ids for side in sides.values()):
        raise InputError(
            f"{name}: expected a store with scores or weights, got one that keeps "
            f"{' and '.join(store.manifest['keep'])}; `sepo score --oracle` writes scores"
        )
    scores = tuple(sides[side].all_scores() for side in SIDES)
    every = np.concatenate(scores)
    tokens = store.lengths.sum(axis=0).tolist()
    about = {
        "name": name,
        "made": _made(store.manifest),
        "pairs": len(store),
        "prompt_tokens": tokens[0],
        "tokens": dict(zip(SIDES, tokens[1:], strict=True)),
        "scored": len(every),
        "spread": float(every.std(dtype=np.float64)) if len(every) else None,
        # a few tokens are far off: the colours are for the others
        "scale": float(np.quantile(np.abs(every), 0.98)) if len(every) else None,
        "scores": {side: _summary(s) for side, s in zip(SIDES, scores, strict=True)},
        "by_share": {side: sides[side].by_share() for side in SIDES},
        "by_place": {side: sides[side].by_place() for side in SIDES},
        "by_string": {side: sides[side].by_string(texts) for side in SIDES},
        "read": _read_by_share(store, sides),
    }
    return about, scores


def histograms(scores: Sequence[tuple]) -> list[dict | None]:
    """Of each store (chosen, rejected) the share of tokens in each bin; the bins are common to all.

    They leave out half a per cent at either end, which would make the rest a single bin.
    """
    every = [np.concatenate(pair) for pair in scores]
    present = [one for one in every if len(one)]
    if not present:
        return [None] * len(every)
    low = min(float(np.quantile(one, 0.005)) for one in present)
    high = max(float(np.quantile(one, 0.995)) for one in present)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    result: list[dict | None] = []
    for one, pair in zip(every, scores, strict=True):
        if not len(one):
            result.append(None)
            continue
        outside = ((one < low) | (one > high)).mean()
        shares = {
            side: (np.histogram(s, edges)[0] / max(1, len(s))).tolist()
            for side, s in zip(SIDES, pair, strict=True)
        }
        result.append({"edges": edges.tolist(), "outside": float(outside), **shares})
    return result


def same_tokens(stores: Sequence[ScoredStore]) -> dict | None:
    """How far two stores of the same tokens select the same at each of SHOWN; None: other tokens.

    The share of the first's selected tokens that the second selects too, over rows in both.
    """
    others = {pair.id: i for i, pair in enumerate(stores[1].pairs())}
    both = selected = np.zeros(len(SHOWN), np.int64)
    rows = 0
    for pair in stores[0].pairs():
        if pair.id not in others:
            continue
        other = stores[1][others[pair.id]]
        if any(not np.array_equal(getattr(pair, s), getattr(other, s)) for s in SIDES):
            return None
        rows += 1
        for side in SIDES:
            a, b = levels(pair, side), levels(other, side)
            if a is not None and b is not None:
                shown = np.arange(len(SHOWN))[:, None]
                selected = selected + (a <= shown).sum(axis=1)
                both = both + ((a <= shown) & (b <= shown)).sum(axis=1)
    if not selected.all():
        return None
    return {"rows": rows, "shared": (both / selected).tolist()}


def _read_by_share(store: ScoredStore, sides: dict[str, Side]) -> list[float] | None:
    """Share of all tokens, prompts once, that the model reads after cutting; None: some unranked."""
    if any(side.ranked < len(store) for side in sides.values()):
        return None
    # the last selected token is a target, never read
    read = store.lengths[:, 0].sum() + sum(side.ends - len(store) for side in sides.values())
    return (read / store.lengths.sum()).tolist()


def _summary(scores: np.ndarray) -> dict | None:  # (tokens,) float32
    if not len(scores):
        return None
    return {
        "tokens": len(scores),
        "mean": float(scores.mean(dtype=np.float64)),
        "spread": float(scores.std(dtype=np.float64)),
        "quantiles": np.quantile(scores.astype(np.float64), QUANTILES).tolist(),
    }


def _made(manifest: dict) -> dict:
    """Repeat what the manifest says of its making, without hashes."""
    made = {role: manifest.get(f"{role}_name") for role in MODELS}
    made |= {f"{role}_dtype": arithmetic_of(manifest, role) for role in MODELS}
    made |= {key: manifest.get(key) for key in ("tokenizer_name", "sepo", "max_length", "keep")}
    reading = manifest.get("reading") or {}  # what its maker wished to say, so it may be anything
    kinds = {"source": str, "read": int, "dropped": dict, "noted": dict}
    made["reading"] = {key: _of_kind(reading.get(key), kind) for key, kind in kinds.items()}
    transferred = manifest.get("transferred") or {}
    made["transferred_from"] = _of_kind(transferred.get("from"), str)
    made["precision_check"] = manifest.get("precision_check")
    return made


def _of_kind(value, kind: type):
    """The value if it is of a kind, and a dict's values are counts; else None."""
    if not isinstance(value, kind):
        return None
    if isinstance(value, dict) and not all(type(count) is int for count in value.values()):
        return None
    return value
