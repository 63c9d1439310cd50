"""From a Preference to a TokenPair: render once, tokenise once, find the response inside.

The text that the model will see is made first, whole, and cut into prompt and response after
tokenising. Tokenising the two apart would give other tokens at the boundary than a model that
reads the prompt and goes on writing ever meets.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sepo.data.read.formats import PlainText, Preference, Released, TokenIds
from sepo.data.read.reasons import DroppedRow, DropReason, RowNote
from sepo.data.read.render import Span, spans
from sepo.data.read.sepo_csv import Selected
from sepo.data.types import TokenPair
from sepo.errors import InputError


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A pair and what a reader of the report should know about it."""

    pair: TokenPair
    notes: tuple[RowNote, ...]


def tokenise(
    preferences: Sequence[Preference],
    tokenizer: Any,  # a fast transformers tokenizer; None will do for token ids
    *,
    max_length: int | None = None,  # tokens of the prompt and one response; None: no limit
    append_eos: bool = True,  # plain text only: a chat template brings its own end-of-turn token
    strict: bool = False,  # drop what would be kept with a note
) -> list[Tokenised | DroppedRow]:
    """Tokenise a batch of rows; one result a row, in order.

    Messages: the chat template renders prompt and response in one; the response runs up to and
    including its end-of-turn token, and template text after that is left out. Plain text: prompt
    and response are one string after the special tokens that the tokenizer puts before any text
    (not doubled if the text begins with them), and the end token follows the response. Token ids:
    taken as they are.

    A token that holds characters of both prompt and response belongs to the response. The prompt
    is what both responses have in common up to there. A response cut by `max_length` has no end
    token. What a template makes of a row is compared with the row, and with what inference
    renders; `RowNote` says what can be found. Raises InputError if the tokenizer cannot do what a
    row needs.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"expected max_length >= 2, got {max_length}")
    has_text = any(not isinstance(p, TokenIds) for p in preferences)
    rules = _rules(tokenizer) if has_text else _Rules([], None, frozenset(), frozenset())
    has_plain = any(isinstance(p, PlainText | Released) for p in preferences)
    if has_plain and append_eos and rules.eos is None:
        raise InputError("expected a tokenizer with an eos_token, or append_eos=False; got none")
    sides = [p if isinstance(p, TokenIds) else spans(p, tokenizer) for p in preferences]
    texts = [
        (p.id, span.text)
        for p, pair in zip(preferences, sides, strict=True)
        if isinstance(pair, tuple)
        for span in pair
    ]
    encoded = iter(_encode(tokenizer, texts))
    results: list[Tokenised | DroppedRow] = []
    for preference, pair in zip(preferences, sides, strict=True):
        whole: TokenPair | DroppedRow
        if isinstance(pair, DroppedRow):
            results.append(pair)
            continue
        if isinstance(pair, TokenIds):
            whole, notes = _pair_of_ids(pair, tokenizer)
        else:
            cut = [_cut_out(span, next(encoded), rules, append_eos) for span in pair]
            whole, notes = _pair_of_text(preference.id, *cut, has_prompt=pair[0].start > 0)
            notes = [*dict.fromkeys(note for span in pair for note in span.notes), *notes]
            if isinstance(preference, Released) and isinstance(whole, TokenPair):
                whole = _with_selected(whole, preference.selected)
        done = whole if isinstance(whole, DroppedRow) else _finish(whole, notes, max_length)
        if strict and isinstance(done, Tokenised) and done.notes:
            done = DroppedRow(preference.id, done.notes[0])
        results.append(done)
    return results


# --- its tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rules:
    """Collect what a tokenizer says about its special tokens."""

    prefix: list[int]  # before any plain text
    eos: int | None  # after a plain text response
    special: frozenset[int]
    added: frozenset[int]  # not special, but added as one token: some end-of-turn tokens are


def _rules(tokenizer: Any) -> _Rules:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "expected a fast tokenizer, which tells where in the text a token comes from, got "
            f"{type(tokenizer).__name__}"
        )
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    # white space can be an added token too; it ends no turn
    other = {i for i, token in added.items() if token.content.strip()} - special
    return _Rules(
        text_prefix(tokenizer),
        tokenizer.eos_token_id,
        frozenset(special),
        frozenset(other),
    )


def text_prefix(tokenizer: Any) -> list[int]:
    """Ids of what a tokenizer puts before any plain text, a bos if it has one to put there."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:at]


def _encode(
    tokenizer: Any,
    texts: list[tuple[str, str]],  # (id of the row, text)
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids and character offsets of each text."""
    if not texts:
        return []
    try:
        encoded = tokenizer(
            [text for _, text in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
    except (UnicodeError, TypeError):
        _refuse_half_characters(texts)
        raise
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _refuse_half_characters(texts: list[tuple[str, str]]) -> None:
    """JSON can write half of a character (\\ud83d), which no text can hold."""
    for pair_id, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise InputError(
                f"pair {pair_id}: expected text, got half of a character, {half}"
            ) from error


@dataclass(frozen=True, slots=True)
class _Side:
    ids: np.ndarray  # (T0 + T,) int32 prompt and response, its end-of-turn token included
    start: int  # index of the first token with a character of the response
    body: int  # index one past the last token of the response that is not its end-of-turn token
    straddles: bool  # the first token holds the end of the prompt as well


def _cut_out(
    span: Span,
    encoding: tuple[list[int], list[tuple[int, int]]],
    rules: _Rules,
    append_eos: bool,
) -> _Side | None:
    """One side's tokens up to the end of the response; None if the offsets cannot be trusted."""
    ids = np.asarray(encoding[0], dtype=np.int32)  # (N,)
    offsets = np.asarray(encoding[1], dtype=np.int64).reshape(-1, 2)  # (N, 2) characters
    # A character whose bytes are split over several tokens is in the offsets of each of them, so
    # counting in characters leaves no byte of the response on the prompt's side.
    starts, ends = offsets[:, 0], offsets[:, 1]
    if not _covers(span.text, starts, ends):
        return None
    start = int(np.searchsorted(ends, span.start, side="right"))
    after = int(np.searchsorted(ends, span.end, side="right"))  # first token with a later character
    # max: of a blank whose offsets were trimmed only the end is left
    body = max(after, int(np.searchsorted(starts, span.end, side="left")))
    straddles = start < len(ids) and bool(starts[start] < span.start)
    if not span.is_chat:
        side = _Side(ids, start, body, straddles)
        return _plain_side(side, span.text, ends, rules, append_eos)
    stop = _end_of_turn(ids, after, rules)
    if stop is None and body > start and int(ids[body - 1]) in rules.special:
        stop = body - 1  # a template that ends a call of tools in another token than an answer
    if stop is None:
        return _Side(ids[:body], start, body, straddles)
    # min: an end-of-turn token that takes in the blanks before it starts inside the response
    return _Side(ids[: stop + 1], start, min(body, stop), straddles)


def _end_of_turn(ids: np.ndarray, first: int, rules: _Rules) -> int | None:
    """Index of the first special token at or after `first`, the end of the content."""
    tail = ids[first:].tolist()
    for kind in (rules.special, rules.added):
        for i, token in enumerate(tail):
            if token in kind:
                return first + i
    return None


def _plain_side(side: _Side, text: str, ends: np.ndarray, rules: _Rules, append_eos: bool) -> _Side:
    """The side with the tokenizer's own tokens before it and the end token after it, both once."""
    ids, body = side.ids.tolist(), side.body
    prefix = [] if ids[: len(rules.prefix)] == rules.prefix else rules.prefix
    if append_eos and rules.eos is not None:
        end = _brought_end(side, ends, text, rules.eos)
        body = min(body, len(ids) if end is None else end)
        ids = [*ids[:end], rules.eos]
    return _Side(
        np.asarray([*prefix, *ids], dtype=np.int32),
        side.start + len(prefix),
        body + len(prefix),
        side.straddles,
    )


def _brought_end(side: _Side, ends: np.ndarray, text: str, eos: int) -> int | None:
    """Index of the end token that the response brings, after which it has nothing but blanks."""
    for i in reversed(range(side.start, len(side.ids))):
        if text[ends[i] :].strip():
            return None
        if side.ids[i] == eos:
            return i
    return None


def _covers(text: str, starts: np.ndarray, ends: np.ndarray) -> bool:  # (N,), (N,) characters
    """Whether the tokens go through the text in order and leave out nothing but blanks.

    Trimmed offsets leave out white space; normalisation leaves out combining and control
    characters. Anything else means that the offsets do not say where the tokens come from.
    """
    if (np.diff(starts) < 0).any() or (np.diff(ends) < 0).any() or (starts > ends).any():
        return False
    froms, tos = np.append(0, ends), np.append(starts, len(text))
    gaps = np.flatnonzero(froms < tos)
    return all(
        unicodedata.category(char)[0] in "ZMC" for i in gaps for char in text[froms[i] : tos[i]]
    )


# --- the pair ------------------------------------------------------------------------------------


def _pair_of_text(
    pair_id: str, chosen: _Side | None, rejected: _Side | None, *, has_prompt: bool
) -> tuple[TokenPair | DroppedRow, list[RowNote]]:
    if chosen is None or rejected is None:
        return DroppedRow(pair_id, DropReason.OFFSETS), []
    # Where a token straddles the boundary, the tokens before it may differ as well: what is not
    # common to both sides is no prompt.
    limit = min(chosen.start, rejected.start)
    differ = np.flatnonzero(chosen.ids[:limit] != rejected.ids[:limit])
    start = int(differ[0]) if len(differ) else limit
    sides = (chosen, rejected)
    if start == 0:
        return DroppedRow(pair_id, DropReason.MERGED if has_prompt else DropReason.NO_PROMPT), []
    if any(side.body <= side.start for side in sides):
        return DroppedRow(pair_id, DropReason.EMPTY, "no token is left of it"), []
    notes = []
    if any(side.straddles or side.start > start for side in sides):
        notes.append(RowNote.STRADDLE)
    if any(len(side.ids) == side.body for side in sides):
        notes.append(RowNote.NO_END)
    if _is_prefix(*(side.ids[start : side.body] for side in sides)):
        notes.append(RowNote.PREFIX)
    prompt = chosen.ids[:start]
    pair = TokenPair(
        id=pair_id, prompt=prompt, chosen=chosen.ids[start:], rejected=rejected.ids[start:]
    )
    return pair, notes


def _with_selected(pair: TokenPair, selected: Sequence[Selected]) -> TokenPair | DroppedRow:
    weights: dict[str, Any] = {}
    for side, one in zip(("chosen", "rejected"), selected, strict=True):
        weight = one.weight(getattr(pair, side))
        if isinstance(weight, str):
            return DroppedRow(pair.id, DropReason.OTHER_IDS, f"pair {pair.id}, {side} {weight}")
        if not weight.any():
            return DroppedRow(pair.id, DropReason.ZERO_WEIGHT)
        weights[f"{side}_weight"] = weight
    return replace(pair, **weights)


def _pair_of_ids(p: TokenIds, tokenizer: Any) -> tuple[TokenPair, list[RowNote]]:
    highest = max(int(ids.max()) for ids in (p.prompt, p.chosen, p.rejected))
    if tokenizer is not None and highest >= len(tokenizer):
        raise InputError(
            f"pair {p.id}: expected token ids below {len(tokenizer)}, the size of the vocabulary, "
            f"got {highest}"
        )
    pair = TokenPair(
        id=p.id,
        prompt=p.prompt,
        chosen=p.chosen,
        rejected=p.rejected,
        chosen_weight=p.chosen_weight,
        rejected_weight=p.rejected_weight,
    )
    notes = [RowNote.PREFIX] if _is_prefix(p.chosen, p.rejected) else []
    begins = [_begins(side, p.prompt) for side in (p.chosen, p.rejected)]
    if all(begins) or (any(begins) and len(p.prompt) > 2):
        notes.insert(0, RowNote.REPEATS)
    return pair, notes


def _finish(
    pair: TokenPair, notes: list[RowNote], max_length: int | None
) -> Tokenised | DroppedRow:
    """Cut the responses to max_length and refuse what cannot be learnt from."""
    if np.array_equal(pair.chosen, pair.rejected):
        lost = "the chat template leaves out what differs" if RowNote.LOST_RESPONSE in notes else ""
        return DroppedRow(pair.id, DropReason.SAME, lost)
    if max_length is None:
        return Tokenised(pair, tuple(notes))
    room = max_length - len(pair.prompt)
    if room <= 0:
        return DroppedRow(pair.id, DropReason.NO_ROOM)
    notes = list(notes)
    for side, note in (("chosen", RowNote.CUT_CHOSEN), ("rejected", RowNote.CUT_REJECTED)):
        if len(getattr(pair, side)) > room:
            notes.append(note)
            weight = getattr(pair, f"{side}_weight")
            kept = {side: getattr(pair, side)[:room]}
            if weight is not None:
                kept[f"{side}_weight"] = weight[:room]
            pair = replace(pair, **kept)
    if np.array_equal(pair.chosen, pair.rejected):
        return DroppedRow(pair.id, DropReason.SAME_CUT)
    for weight in (pair.chosen_weight, pair.rejected_weight):
        if weight is not None and not weight.any():
            return DroppedRow(pair.id, DropReason.ZERO_WEIGHT, "after the cut at max_length")
    return Tokenised(pair, tuple(notes))


def _begins(ids: np.ndarray, start: np.ndarray) -> bool:
    return len(ids) >= len(start) and _is_prefix(ids, start)


def _is_prefix(one: np.ndarray, other: np.ndarray) -> bool:
    n = min(len(one), len(other))
    return bool((one[:n] == other[:n]).all())
