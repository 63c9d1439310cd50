"""Seconds and memory of a training step a pair: TRL, this project, and each saving by itself."""

import argparse
from collections.abc import Sequence

from bench.end_to_end import models, ours, savings, table, trl
from bench.end_to_end.arguments import add_arguments, be_quiet, say, setting
from bench.end_to_end.contender import Contender
from bench.end_to_end.race import Row, race
from bench.end_to_end.rows import deal, default_source, texts, with_scores
from bench.end_to_end.weights import Weights
from sepo.data.types import TokenPair

ATTENTION = {"cpu": (None,), "cuda": ("varlen", "flex", "sdpa")}
GROUPS = ("trl", "sepo", "savings")


def main(argv: Sequence[str] | None = None) -> int:
    rows = run(parser().parse_args(argv))
    wrong = [row for row in rows if row.group != "trl" and row.status == "refused"]
    return 1 if wrong or not any(row.status == "measured" for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench.end_to_end", description=__doc__)
    add_arguments(found, rounds=7)
    add = found.add_argument
    add("--saving_rounds", type=int, default=3, help="of each saving")
    add("--only", nargs="+", default=GROUPS, choices=GROUPS, help="groups of contenders")
    return found


def run(args: argparse.Namespace) -> list[Row]:
    """Race, print, append."""
    be_quiet()
    name = args.model or models.smollm2_here()
    model, tokenizer = models.load(name, args.device)
    weights = Weights(model)
    pairs, about = same_pairs(args, weights, tokenizer)
    say(f"{name}: {about}\n{args.rounds} rounds of {args.pairs}, at most {args.max_length} tokens")
    conditions = setting(args, trl.version())
    say(*conditions)
    rounds = deal([with_scores(pair) for pair in pairs], args.rounds, args.pairs)
    rounds, seconds = cached(weights, rounds)
    everybody = contenders(args, weights, rounds, tokenizer)
    rows = race(everybody, weights, rounds, tell=say)
    say("", table.legend(), "", table.table(rows), "", table.bars(rows))
    say(f"the cached reference costs {seconds:.3f} s a pair, once")
    path = args.json or table.default_path(args.device)
    more = dict(model=name, pairs=args.pairs, rounds=args.rounds, reference_seconds=seconds)
    table.append(rows, path, args.device, more | {"setting": conditions})
    say(f"appended to {path}")
    return rows


def same_pairs(
    args: argparse.Namespace, weights: Weights, tokenizer
) -> tuple[list[TokenPair], str]:  # the pairs that everybody takes, and what became of the rest
    count, V = args.pairs * args.rounds, weights.model.config.vocab_size
    pairs, about = models.pairs(args.data, tokenizer, V, args.max_length, count)
    if tokenizer is not None and "trl" in args.only:
        kept = trl.kept(texts(args.data or default_source()), weights, tokenizer, args.max_length)
        about += f"\n{sum(pair.id not in kept for pair in pairs):8} of these dropped by TRL"
        pairs = [pair for pair in pairs if pair.id in kept]
    return pairs, about


def contenders(args: argparse.Namespace, weights: Weights, rounds, tokenizer) -> list[Contender]:
    bf16, found = not args.float32, []
    if "trl" in args.only:
        found += trl.contenders(weights, rounds, tokenizer, bf16=bf16, max_length=args.max_length)
    if "sepo" in args.only:
        found += ours.contenders(weights, rounds, bf16=bf16, attn_impls=ATTENTION[args.device])
    if "savings" in args.only:
        found += savings.contenders(weights, rounds, bf16=bf16, turns=args.saving_rounds)
    return found


def cached(weights: Weights, rounds: list[list]) -> tuple[list[list], float]:
    """The rounds with the reference's log-probabilities, and what they cost a pair."""
    flat = {pair.id: pair for pairs in rounds for pair in pairs}
    done, seconds = ours.reference_logp(weights, list(flat.values()))
    flat = {pair.id: pair for pair in done}
    return [[flat[pair.id] for pair in pairs] for pairs in rounds], seconds


if __name__ == "__main__":
    raise SystemExit(main())
