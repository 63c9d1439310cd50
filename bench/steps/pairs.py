"""The pairs that every contender trains on, and the rounds they come in."""

import json
import os
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sepo.data.read.formats import DroppedRow, Preference, find_format, read_row
from sepo.data.read.load import load_rows
from sepo.data.read.read import read_pairs
from sepo.data.types import ScoredPair, TokenPair
from sepo.system.files import Atomic

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "runs/data/dpo_en_demo.json"  # LLaMA-Factory's, if it was put there: 300 pairs
TEXTS = ROOT / "python/sepo/demo/data/pairs.jsonl"  # this project's own, which are short
JOINED = ROOT / "runs/bench/joined-pairs.jsonl"
# of EXAMPLE's prompts, chosen and rejected responses, cut at 512 tokens: medians, and standard
# deviations of the logarithm
MEDIANS, SPREADS = np.array([100, 205, 224]), np.array([0.75, 0.9, 0.8])
WORDS_A_TOKEN = 0.84  # of TEXTS, by SmolLM2's tokenizer


def default_source() -> Path:
    return EXAMPLE if EXAMPLE.exists() else joined_texts()


def joined_texts(file: Path = JOINED, count: int = 300) -> Path:
    """A file of pairs as long as EXAMPLE's, made of TEXTS end to end; the same one every time."""
    rng, rows = np.random.default_rng(0), load_rows(TEXTS)
    words = {side: " ".join(rows[side]).split() for side in ("prompt", "chosen", "rejected")}

    def draw(side: str, tokens: int) -> str:
        size = max(4, int(WORDS_A_TOKEN * tokens))
        start = rng.integers(len(words[side]) - size)
        return " ".join(words[side][start : start + size])

    pairs = []
    for number in range(count):
        prompt, *responses = map(draw, words, draw_lengths(rng))
        chosen, rejected = (f" {text}" for text in responses)
        pairs.append(dict(id=f"joined-{number}", prompt=prompt, chosen=chosen, rejected=rejected))
    file.parent.mkdir(parents=True, exist_ok=True)
    with Atomic(file, str(os.getpid())) as temporary:
        temporary.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def draw_lengths(rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:  # (3,) tokens
    return np.exp(rng.normal(np.log(MEDIANS * scale), SPREADS)).astype(int)


def taken(
    source: Path | None, tokenizer, vocab_size: int, max_length: int, count: int
) -> tuple[list[TokenPair], str]:  # what became of the rows
    """Real ones for a model with a tokenizer, drawn ones for a shape."""
    if tokenizer is None:
        return drawn_pairs(count, vocab_size, max_length), f"{count} drawn pairs"
    read = read_pairs(source or default_source(), tokenizer, max_length=max_length)
    return read.pairs, str(read.report)


def texts(source: Path) -> list[dict]:
    """The same rows as TRL wants them, with the ids that `taken` gives them."""
    rows = load_rows(source)
    form = find_format(rows.column_names)
    read = (read_row(row, number, form) for number, row in enumerate(rows))
    return [text(one) for one in read if not isinstance(one, DroppedRow)]


def text(one: Preference) -> dict:
    turn = lambda answer: answer if isinstance(answer, str) else [answer]
    return dict(id=one.id, prompt=one.prompt, chosen=turn(one.chosen), rejected=turn(one.rejected))


def drawn_pairs(count: int, vocab_size: int, max_length: int, seed: int = 0) -> list[TokenPair]:
    """Random tokens, in number as EXAMPLE's; cut at another length, in proportion to it."""
    rng = np.random.default_rng(seed)
    tokens = lambda n: rng.integers(0, vocab_size, n).astype(np.int32)
    pairs = []
    for i in range(count):
        prompt, chosen, rejected = draw_lengths(rng, max_length / 512)
        prompt = np.clip(prompt, 8, max_length - 8)
        room = max_length - prompt
        sizes = prompt, *np.clip((chosen, rejected), 2, room)
        values = dict(zip(("prompt", "chosen", "rejected"), map(tokens, sizes), strict=True))
        pairs.append(TokenPair(id=str(i), **values))
    return pairs


def with_scores(pair: TokenPair) -> ScoredPair:
    """Scores drawn from the pair's id: which tokens are selected changes no time, how many does.

    Drawn independently they also leave the last selected token near the end of a response, so that
    truncation saves hardly anything: an oracle whose scores cluster early saves more.
    """
    rng = np.random.default_rng(zlib.crc32(pair.id.encode()))
    draw = lambda tokens: rng.normal(size=len(tokens)).astype(np.float32)
    scores = dict(chosen_score=draw(pair.chosen), rejected_score=draw(pair.rejected))
    return ScoredPair(**asdict(pair), **scores)


def deal(pairs: list, num_rounds: int, per_round: int, seed: int = 0) -> list[list]:
    """Rounds of shuffled pairs, none repeated before all were used; round 0 is the gate's."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    timed = [
        [pairs[i] for i in np.take(order, range(r * per_round, (r + 1) * per_round), mode="wrap")]
        for r in range(num_rounds)
    ]
    return [gate_pairs(pairs), *timed]


def gate_pairs(pairs: list) -> list:
    """Two of about sixty tokens: everybody computes them in float32, which is slow."""
    return sorted(pairs, key=lambda pair: abs(len(pair) - 60))[:2]
