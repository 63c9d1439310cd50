"""The demo's judge: VADER, a sentiment lexicon with rules. It needs no model and no network."""

import re
from functools import cache

from sepo.errors import needs

with needs("demo", "the demo's judge"):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

# VADER looks words up in lower case after stripping the punctuation around them.
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@cache
def analyser():
    """VADER's analyser, made once: reading its 7,500-word lexicon takes longer than judging."""
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score of one text, from -1 (most negative) to 1 (most positive)."""
    return analyser().polarity_scores(text)["compound"]


def lexicon_words(text: str) -> list[tuple[int, int]]:
    """The character spans [start, end) of the words of `text` that VADER's lexicon holds."""
    lexicon = analyser().lexicon
    return [m.span() for m in WORD.finditer(text) if m.group().lower() in lexicon]


def lexicon_tokens(
    text: str,
    offsets: list[tuple[int, int]],  # the characters [start, end) of each token of `text`
) -> list[bool]:
    """For each token: does it hold at least one character of a word of VADER's lexicon?"""
    words = lexicon_words(text)
    return [
        any(start < w_end and w_start < end for w_start, w_end in words) for start, end in offsets
    ]
