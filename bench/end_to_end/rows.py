"""The pairs that every contender trains on, and the rounds they come in."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from sepo.data.formats import Drop, Preference, find_format, read_row
from sepo.data.load import load_rows
from sepo.data.read import read_pairs
from sepo.data.types import ScoredPair, TokenPair

ROOT = Path(__file__).parents[2]
# LLaMA-Factory's example, if it was put there: 300 pairs of a few hundred tokens. Else this
# project's own, which are short
SOURCES = ROOT / "runs/data/dpo_en_demo.json", ROOT / "examples/sentiment/pairs.jsonl"


def default_source() -> Path:
    return next(path for path in SOURCES if path.exists())


def real_pairs(source: Path, tokenizer, max_length: int) -> tuple[list[TokenPair], str]:
    """Pairs, and what became of the rows."""
    read = read_pairs(source, tokenizer, max_length=max_length)
    return read.pairs, str(read.report)


def texts(source: Path) -> list[dict]:
    """The same rows as TRL wants them, with the ids that `real_pairs` gives them."""
    rows = load_rows(source)
    form = find_format(rows.column_names)
    read = (read_row(row, number, form) for number, row in enumerate(rows))
    return [text(one) for one in read if not isinstance(one, Drop)]


def text(one: Preference) -> dict:
    turn = lambda answer: answer if isinstance(answer, str) else [answer]
    return {
        "id": one.id, "prompt": one.prompt, "chosen": turn(one.chosen), "rejected": turn(one.rejected)
    }  # fmt: skip


def drawn_pairs(count: int, vocab_size: int, max_length: int, seed: int = 0) -> list[TokenPair]:
    """Random tokens, as long as dpo_en_demo.json's: medians of 100, 205 and 224 at 512 tokens."""
    rng = np.random.default_rng(seed)
    tokens = lambda n: rng.integers(0, vocab_size, n).astype(np.int32)
    medians, spread = np.array([100, 205, 224]) * max_length / 512, [0.75, 0.9, 0.8]
    pairs = []
    for i in range(count):
        prompt, chosen, rejected = np.exp(rng.normal(np.log(medians), spread)).astype(int)
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
    return ScoredPair(
        id=pair.id,
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        chosen_score=draw(pair.chosen),
        rejected_score=draw(pair.rejected),
    )


def with_reference(pairs: list[ScoredPair], logp: list[tuple]) -> list[ScoredPair]:
    return [
        replace(pair, chosen_ref_logp=chosen, rejected_ref_logp=rejected)
        for pair, (chosen, rejected) in zip(pairs, logp, strict=True)
    ]


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
