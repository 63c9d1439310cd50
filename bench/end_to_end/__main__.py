"""Seconds and memory of a training step a pair: TRL, this project, and each saving by itself."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars

from bench import report
from bench.end_to_end import models, ours, savings, table, trl
from bench.end_to_end.contender import Contender
from bench.end_to_end.race import Row, race
from bench.end_to_end.rows import deal, default_source, texts, with_scores
from bench.end_to_end.weights import Weights
from bench.harness import device_here
from sepo.data.types import TokenPair

ATTENTION = {"cpu": (None,), "cuda": ("varlen", "flex", "sdpa")}
GROUPS = ("trl", "sepo", "savings")


def main(argv: Sequence[str] | None = None) -> int:
    rows = run(parser().parse_args(argv))
    wrong = [row for row in rows if row.group != "trl" and row.status == "refused"]
    return 1 if wrong or not any(row.status == "measured" for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench.end_to_end", description=__doc__)
    add = found.add_argument
    add("--model", help=f"smollm2, {', '.join(models.SHAPES)}, a directory or a hub id")
    add("--data", type=Path, help="preference pairs; default dpo_en_demo.json, else examples/")
    add("--pairs", type=int, default=4, help="of one step")
    add("--rounds", type=int, default=7)
    add("--saving_rounds", type=int, default=3, help="of each saving")
    add("--max_length", type=int, default=512)
    add("--only", nargs="+", default=GROUPS, choices=GROUPS, help="groups of contenders")
    add("--device", default=device_here(), choices=("cpu", "cuda"))
    add("--float32", action="store_true", help="no autocast")
    add("--json", type=Path, help="append rows to this file; default bench/results")
    return found


def run(args: argparse.Namespace) -> list[Row]:
    """Race, print, append."""
    be_quiet()
    name = args.model or models.smollm2_here()
    model, tokenizer = models.load(name, args.device)
    weights = Weights(model)
    pairs, about = same_pairs(args, weights, tokenizer)
    say(f"{name}: {about}\n{args.rounds} rounds of {args.pairs}, at most {args.max_length} tokens")
    say(*setting(args))
    rounds = deal([with_scores(pair) for pair in pairs], args.rounds, args.pairs)
    rounds, seconds = cached(weights, rounds)
    everybody = contenders(args, weights, rounds, tokenizer)
    rows = race(everybody, weights, rounds, saving_rounds=args.saving_rounds, tell=say)
    say("", table.LEGEND, "", table.table(rows), "", table.bars(rows))
    say(f"the cached reference costs {seconds:.3f} s a pair, once")
    path = args.json or table.default_path(args.device)
    more = dict(model=name, pairs=args.pairs, rounds=args.rounds, reference_seconds=seconds)
    table.append(rows, path, args.device, more | {"setting": setting(args)})
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


def setting(args: argparse.Namespace) -> tuple[str, str, str]:
    """What is the same for all."""
    return (
        f"weights float32, {'no' if args.float32 else 'bfloat16'} autocast, fused AdamW in float32",
        f"{report.machine(args.device)}, {torch.get_num_threads()} threads",
        f"torch {torch.__version__}, transformers {transformers.__version__}, {trl.version()}",
    )


def contenders(args: argparse.Namespace, weights: Weights, rounds, tokenizer) -> list[Contender]:
    bf16, found = not args.float32, []
    if "trl" in args.only:
        found += trl.contenders(weights, rounds, tokenizer, bf16=bf16, max_length=args.max_length)
    if "sepo" in args.only:
        found += ours.contenders(weights, rounds, bf16=bf16, attn_impls=ATTENTION[args.device])
    if "savings" in args.only:
        found += savings.contenders(weights, rounds, bf16=bf16)
    return found


def cached(weights: Weights, rounds: list[list]) -> tuple[list[list], float]:
    """The rounds with the reference's log-probabilities, and what they cost a pair."""
    flat = {pair.id: pair for pairs in rounds for pair in pairs}
    done, seconds = ours.reference_logp(weights, list(flat.values()))
    flat = {pair.id: pair for pair in done}
    return [[flat[pair.id] for pair in pairs] for pairs in rounds], seconds


def be_quiet() -> None:
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # a run that is stopped has said where


if __name__ == "__main__":
    raise SystemExit(main())
