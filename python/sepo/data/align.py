"""Scores and selections carried to another tokenizer's tokens (SePO, arXiv 2408.13518, App. B).

Both tokenizers cut the same text, so what they have in common is its bytes: not its characters,
which byte-level tokens may split, and not `offset_mapping`, which some tokenizers trim or round.
A response's tokens are described by bounds, (T + 1,): token t holds bytes [bounds[t], bounds[t + 1])
of the response. An end-of-turn token holds one byte after the text, which no text has, so it meets
the other tokenizer's end-of-turn token and nothing else.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sepo.data.read.render import Span
from sepo.errors import InputError

Aggregate = Literal["mean", "max", "min"]

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
NO_TEXT = b"\xff"  # no UTF-8 text has it, so an id without a piece never spells anything


def transfer_scores(
    score: np.ndarray,  # (T_source,) float32, nats
    source: np.ndarray,  # (T_source + 1,) int64 bounds of the scored tokens, ascending
    target: np.ndarray,  # (T_target + 1,) int64 bounds of the other tokenizer's tokens
    *,
    aggregate: Aggregate = "mean",  # over the bytes of a target token
) -> np.ndarray:  # (T_target,) float32, NaN where a token holds no byte of a scored one
    """A score for each target token: every byte has its source token's, a token its bytes'.

    Tokens with the same bounds keep their scores bit for bit. Raises InputError where `score` and
    `source` disagree in length, or for another `aggregate`.
    """
    _check_bounds(score, source)
    if aggregate not in ("mean", "max", "min"):
        raise InputError(f"aggregate: expected mean, max or min, got {aggregate}")
    result = np.full(len(target) - 1, np.nan, np.float32)
    of_source, of_target, num_bytes = _overlaps(source, target)
    if len(of_target) == 0:
        return result
    first = np.flatnonzero(np.diff(of_target, prepend=-1))  # overlap at which each token begins
    value = score[of_source]
    if aggregate == "mean":
        # float64: a float32 score times a length is exact there, and so is the way back
        total = np.add.reduceat(value * num_bytes.astype(np.float64), first)
        carried = total / np.add.reduceat(num_bytes, first)
    else:
        carried = getattr(np, f"{aggregate}imum").reduceat(value, first)
    result[of_target[first]] = carried
    return result


def transfer_selection(
    positions: np.ndarray,  # (K_source,) int32
    source: np.ndarray,  # (T_source + 1,) int64 bounds, ascending
    target: np.ndarray,  # (T_target + 1,) int64 bounds
) -> np.ndarray:  # (K_target,) int32 ascending
    """The target tokens that hold a byte of a selected source token (Algorithm 1)."""
    is_selected = np.zeros(len(source) - 1, bool)
    is_selected[positions] = True
    of_source, of_target, _ = _overlaps(source, target)
    return np.unique(of_target[is_selected[of_source]]).astype(np.int32)


def _overlaps(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source token, target token and bytes of every stretch that two tokens share, ascending."""
    edges = np.union1d(source, target)
    start, num_bytes = edges[:-1], np.diff(edges)
    # right: of tokens that begin at one byte only the last holds it
    of_source = np.searchsorted(source, start, side="right") - 1
    of_target = np.searchsorted(target, start, side="right") - 1
    is_shared = (of_source >= 0) & (of_source < len(source) - 1)
    is_shared &= (of_target >= 0) & (of_target < len(target) - 1)
    return of_source[is_shared], of_target[is_shared], num_bytes[is_shared]


def _check_bounds(score: np.ndarray, source: np.ndarray) -> None:
    if len(source) != len(score) + 1:
        raise InputError(
            f"expected {len(score) + 1} bounds for {len(score)} scores, got {len(source)}"
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the tokens of one response lie in its text."""

    bounds: np.ndarray  # (T + 1,) int64, from 0 to the bytes of the response, and one for its end
    has_end: bool  # the last token is its end-of-turn
    is_cut: bool  # the tokens stop before the text does

    def moved(self, by: int, size: int) -> "Placed":
        """The same tokens in a text of `size` bytes in which they lie `by` bytes further on."""
        text = self.bounds[:-1] if self.has_end else self.bounds
        bounds = np.clip(text + by, 0, size)
        if self.has_end:
            bounds = np.append(bounds, size + 1)
        return Placed(bounds, self.has_end, self.is_cut)


class TokenBytes:
    """The bytes that each token of a fast tokenizer stands for, read from its pieces.

    Which alphabet the pieces are written in (byte-level, SentencePiece, plain) is a guess from the
    tokenizer's own description; `place` proves it for every response. Raises InputError for a
    tokenizer that is not fast.
    """

    def __init__(self, tokenizer: Any):  # of transformers
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "expected a fast tokenizer, which shows the pieces of its tokens, got "
                f"{type(tokenizer).__name__}"
            )
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        spell = _alphabet(tokenizer.backend_tokenizer)
        size = 1 + max(vocabulary.values())
        self._pieces = [NO_TEXT] * size
        for piece, token in vocabulary.items():
            # an added token is found in the text as it stands, unless the text is normalised first
            is_literal = token in added and not added[token].normalized
            self._pieces[token] = piece.encode() if is_literal else spell(piece)
        self._lengths = np.fromiter(map(len, self._pieces), np.int64, size)
        self._is_added = np.zeros(size, bool)
        self._is_added[[*added, *tokenizer.all_special_ids]] = True

    def lengths(self, ids: np.ndarray) -> np.ndarray:  # (T,) int32 -> (T,) int64
        """How many bytes each token stands for."""
        return self._lengths[ids]

    def place(self, ids: np.ndarray, span: Span) -> Placed | None:
        """Where the tokens of a response lie in it; None if their bytes aren't those of the text.

        ids: (T,) int32, T >= 1. A blank that the tokenizer puts before a text or behind a special
        token is held by nobody; blanks around the response that its template or a special token
        takes are held by nobody or by that token; of a token that begins in the prompt only the
        bytes of the response count.
        """
        text = span.text.encode()
        start = len(span.text[: span.start].encode())
        end = start + len(span.text[span.start : span.end].encode())
        tokens = _Tokens(
            b"".join(map(self._pieces.__getitem__, ids.tolist())),
            self.lengths(ids),
            self._is_added[ids],
        )
        found = None
        has_end = len(ids) > 1 and bool(tokens.is_added[-1])
        if has_end:
            found = _find(tokens.without_last(), text, start, end, is_whole=True)
        if found is None:  # a special token in the text, at which max_length has cut it
            has_end, found = False, _find(tokens, text, start, end, is_whole=False)
        if found is None:
            return None
        bounds = np.clip(found - start, 0, end - start)
        is_cut = not has_end and bool(text[found[-1] : end].strip())
        if has_end:
            bounds = np.append(bounds, end - start + 1)
        return Placed(bounds, has_end, is_cut)


@dataclass(frozen=True, slots=True)
class _Tokens:
    text: bytes  # of all tokens
    lengths: np.ndarray  # (T,) int64, bytes of each
    is_added: np.ndarray  # (T,) bool

    def without_last(self) -> "_Tokens":
        text = self.text[: len(self.text) - int(self.lengths[-1])]
        return _Tokens(text, self.lengths[:-1], self.is_added[:-1])

    def fit(self, text: bytes, at: int, skip_blank: bool) -> np.ndarray | None:
        """The bounds (T + 1,) in `text` if the tokens spell it from `at` on.

        A tokenizer may put a blank before what follows an added token. Each such stretch is tried
        with it and without it: pieces alone don't tell whether the text had one. The first begins
        with one that is not in the text iff `skip_blank`.
        """
        ends = np.cumsum(self.lengths)
        opens = [0, *(1 + np.flatnonzero(self.is_added[:-1])).tolist()]
        lengths, here, read = self.lengths, at, 0
        for first, after in zip(opens, [*opens[1:], len(lengths)], strict=True):
            stretch = self.text[read : ends[after - 1]]
            if (first > 0 or not skip_blank) and text.startswith(stretch, here):
                here += len(stretch)
            elif (
                (first > 0 or skip_blank)
                and stretch.startswith(b" ")
                and text.startswith(stretch[1:], here)
            ):
                here += len(stretch) - 1
                lengths = lengths - (np.arange(len(lengths)) == first)
            else:
                return None
            read += len(stretch)
        return at + np.append(0, np.cumsum(lengths))


def _find(
    tokens: _Tokens, text: bytes, start: int, end: int, *, is_whole: bool
) -> np.ndarray | None:
    """Bounds (T + 1,) in `text` of the tokens of text[start:end]; None if they don't spell it.

    is_whole: they must reach the end of it but for blanks, as an end-of-turn token follows.
    """
    for at in _places(text, start, len(tokens.text)):
        for skip_blank in (False, True):
            found = tokens.fit(text, at, skip_blank)
            # a place before the response alone is one in the prompt
            if found is None or found[-1] <= start:
                continue
            if not (is_whole and text[found[-1] : end].strip()):
                return found
    return None


def _places(text: bytes, start: int, size: int) -> Iterator[int]:
    """Where the first token may begin, the usual place first."""
    yield start
    yield from range(start - 1, max(-1, start - size), -1)  # it holds the end of the prompt
    at = start
    while text[at : at + 1].isspace():  # blanks that a special token before them has taken
        at += 1
        yield at


def shift(source: bytes, target: bytes) -> int | None:
    """How many bytes further on the same response lies in `target`; None if it isn't the same.

    Two chat templates may leave out blanks around a response, or put something before it.
    """
    if source == target:
        return 0
    for core in (source.strip(), target.strip()):
        first, last = source.find(core), target.find(core)
        if not core or first < 0 or last < 0:
            continue
        if (first, last) == (source.rfind(core), target.rfind(core)):
            return last - first
    return None


def _alphabet(backend: Any) -> Callable[[str], bytes]:
    """Return the function that turns a piece of a fast tokenizer into bytes."""
    said = repr((backend.decoder, backend.pre_tokenizer, backend.normalizer))
    if "ByteLevel" in said:
        return _spell_byte_level
    return _spell_sentencepiece if "▁" in said else str.encode


def _byte_level_table() -> dict[int, int]:
    """Printable bytes of Latin-1 stand for themselves, the others for code points from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {256 + i: byte for i, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_table()


def _spell_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:  # not of that alphabet, so it was added as text
        return piece.encode()


def _spell_sentencepiece(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
