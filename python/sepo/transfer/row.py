"""One scored row from the oracle's tokens to the policy's, and the count of what was carried."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from sepo.data.align import Placed, TokenBytes, shift, transfer_scores, transfer_selection
from sepo.data.read.formats import DroppedRow
from sepo.data.read.render import Span
from sepo.data.selection import Selection
from sepo.data.store.part import TOKENS
from sepo.data.types import ScoredPair, TokenPair

Mode = Literal["score", "overlap"]
Aggregate = Literal["mean", "max"]
SIDES = TOKENS[1:]
Texts = tuple[Span, Span] | DroppedRow  # of chosen and rejected, or why there are none


class SkippedRow(StrEnum):
    """Why a row is not carried."""

    NOT_SCORED = "not in the store"
    NOT_READ = "in the store, but not among the rows that the policy's tokenizer keeps"
    ORACLE = (
        "the oracle's tokens do not spell the response: its tokenizer changes it, or other data"
    )
    POLICY = "the policy's tokens do not spell the response: its tokenizer changes it"
    TEMPLATES = "the two chat templates write different responses"
    UNCOVERED = "no token of a response holds a byte of a scored one"
    UNSELECTED = "no token of a response holds a byte of a selected one"


COUNTS = {  # what is counted of the rows that are carried -> how a report calls it
    "source_tokens": "response tokens in the oracle's tokenizer",
    "source_selected": "of them selected",
    "tokens": "response tokens in the policy's tokenizer",
    "selected": "of them selected",
    "uncovered": "of them without a byte of a scored token",
    "source_cut": "responses cut at max_length in the store",
    "cut": "responses cut at max_length in the policy's tokenizer",
    "one_end": "responses with an end-of-turn token in one tokenizer only",
}


@dataclass
class Coverage:
    """Count what was carried, what was not, and why."""

    rows: int = 0  # carried
    left_out: dict[str, list[str]] = field(default_factory=dict)  # why -> ids
    counts: Counter[str] = field(default_factory=Counter)  # COUNTS, over both responses

    def as_dict(self) -> dict[str, Any]:
        """Everything, all ids included, for a manifest."""
        return {"rows": self.rows, "left_out": self.left_out, **self.counts}

    def __str__(self) -> str:
        out = sum(map(len, self.left_out.values()))
        lines = [f"{self.rows:8} rows carried", f"{out:8} rows left out"]
        for why, ids in sorted(self.left_out.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
            lines.append(f"{len(ids):12} {why} (pair {shown})")
        for name in (name for name in COUNTS if name in self.counts):
            count, what = self.counts[name], COUNTS[name]
            if what.startswith("of them"):
                whole = self.counts["source_tokens" if "source" in name else "tokens"]
                lines.append(f"{count:12} {what} ({count / whole:.2%})")
            else:
                lines.append(f"{count:8} {what}")
        return "\n".join(lines)

    def leave_out(self, why: SkippedRow, pair_id: str) -> None:
        """Name a row that is not carried."""
        self.left_out.setdefault(str(why), []).append(pair_id)


@dataclass(frozen=True)
class RowAligner:
    """Rows from the oracle's tokens to the policy's, one at a time."""

    oracle: TokenBytes
    policy: TokenBytes
    is_same: bool  # the two tokenizers
    mode: Mode
    aggregate: Aggregate
    selection: Selection  # overlap: of the oracle's tokens

    def __call__(
        self,
        scored: ScoredPair,  # in the oracle's tokens
        target: TokenPair,  # in the policy's
        texts: tuple[Texts, Texts],  # as the oracle and as the policy reads it
        counts: Counter[str],  # added to if the row is carried
    ) -> ScoredPair | SkippedRow:
        ours, theirs = texts
        if isinstance(ours, DroppedRow) or isinstance(theirs, DroppedRow):
            return SkippedRow.TEMPLATES
        fields = {name: getattr(target, name) for name in ("id", *TOKENS)}
        found: Counter[str] = Counter()
        for side, source_text, target_text in zip(SIDES, ours, theirs, strict=True):
            source, tokens = getattr(scored, side), getattr(target, side)
            placed = self._place(source, tokens, source_text, target_text)
            if isinstance(placed, SkippedRow):
                return placed
            found.update(
                source_tokens=len(placed[0].bounds) - 1,
                tokens=len(placed[1].bounds) - 1,
                source_cut=placed[0].is_cut,
                cut=placed[1].is_cut,
                one_end=placed[0].has_end != placed[1].has_end,
            )
            bounds = (placed[0].bounds, placed[1].bounds)
            score = getattr(scored, f"{side}_score")
            if self.mode == "score":
                values = self._scores(score, *bounds, side, found)
            else:
                values = self._weights(score, *bounds, side, found)
            if isinstance(values, SkippedRow):
                return values
            fields[f"{side}_{'score' if self.mode == 'score' else 'weight'}"] = values
        counts.update(found)
        return ScoredPair(**fields)

    def _place(
        self, source: np.ndarray, target: np.ndarray, source_text: Span, target_text: Span
    ) -> tuple[Placed, Placed] | SkippedRow:
        """Both tokenisations in the bytes of the policy's response."""
        if self.is_same and np.array_equal(source, target):
            # every token is its own counterpart, also one that holds no byte of the response
            same = Placed(np.arange(len(source) + 1), has_end=True, is_cut=False)
            return same, same
        here = self.oracle.place(source, source_text)
        there = self.policy.place(target, target_text)
        if here is None or there is None:
            return SkippedRow.ORACLE if here is None else SkippedRow.POLICY
        of_oracle, of_policy = (
            t.text[t.start : t.end].encode() for t in (source_text, target_text)
        )
        by = shift(of_oracle, of_policy)
        return SkippedRow.TEMPLATES if by is None else (here.moved(by, len(of_policy)), there)

    def _scores(
        self, score: np.ndarray, source: np.ndarray, target: np.ndarray, side: str, found: Counter
    ) -> np.ndarray | SkippedRow:  # (T,) float32
        is_chosen = side == "chosen"
        aggregate = "min" if self.aggregate == "max" and not is_chosen else self.aggregate
        carried = transfer_scores(score, source, target, aggregate=aggregate)
        is_bare = np.isnan(carried)
        if is_bare.all():
            return SkippedRow.UNCOVERED
        # selected after all others, and no part of a response's mass
        least = min(0, np.nanmin(carried)) if is_chosen else max(0, np.nanmax(carried))
        carried[is_bare] = least
        found["uncovered"] += int(is_bare.sum())
        return carried

    def _weights(
        self, score: np.ndarray, source: np.ndarray, target: np.ndarray, side: str, found: Counter
    ) -> np.ndarray | SkippedRow:  # (T,) float32
        positions = self.selection.by_score(score, side)
        selected = transfer_selection(positions, source, target)
        if len(selected) == 0:
            return SkippedRow.UNSELECTED
        covered = transfer_selection(np.arange(len(score)), source, target)
        weight = np.zeros(len(target) - 1, np.float32)
        weight[selected] = 1
        found["source_selected"] += len(positions)
        found["selected"] += len(selected)
        found["uncovered"] += len(weight) - len(covered)
        return weight
