"""The text of single tokens, so that a response's tokens put together read as the response."""

import unicodedata
from typing import Any

import numpy as np

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, separators: they steer, or hide
LONGEST = 8  # tokens that one character may be cut into: four bytes, and joiners' are characters


class TokenTexts:
    """A tokenizer's tokens as text; each is decoded once."""

    def __init__(self, tokenizer: Any):  # of transformers
        self._tokenizer = tokenizer
        # behind another token, because many decoders take the blank off a text's first
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._anchor_text = self._decode(self._anchor)
        self._known: dict[int, str] = {}

    def whole(self, ids: np.ndarray) -> str:  # (T,) int32
        """The text of a sequence, special tokens included."""
        return self._decode(ids.tolist())

    def one(self, token: int) -> str:
        """A token by itself; one that holds part of a character shows its place with U+FFFD."""
        if token not in self._known:
            self._known[token] = self._behind_anchor([token])
        return self._known[token]

    def each(self, ids: np.ndarray) -> list[str]:  # (T,) int32 -> T
        """Every token's text; of a character cut into several the last has it, the others ""."""
        tokens = ids.tolist()
        texts = [self.one(token) for token in tokens]
        start = 0
        while start < len(tokens):
            end = start + 1
            if BROKEN in texts[start]:
                for stop in range(start + 2, min(start + LONGEST, len(tokens)) + 1):
                    text = self._behind_anchor(tokens[start:stop])
                    if BROKEN not in text:
                        texts[start:stop] = [""] * (stop - start - 1) + [text]
                        end = stop
                        break
            start = end
        return texts

    def _behind_anchor(self, ids: list[int]) -> str:
        text = self._decode(self._anchor + ids)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def visible(text: str) -> str:
    """One token on one line, blanks at its ends marked, what can't be seen as an escape."""
    body = text.strip(" ")
    shown = (
        f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in HIDDEN else c
        for c in body.replace("\n", "⏎").replace("\t", "→")
    )
    start = len(text) - len(text.lstrip(" "))
    return "␣" * start + "".join(shown) + "␣" * (len(text) - len(body) - start)
