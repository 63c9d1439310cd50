"""Seconds and memory of a TDPO and a SparsePO step, beside full softmaxes of both models."""

import argparse
import gc
from collections.abc import Sequence

from bench.end_to_end import models, table
from bench.end_to_end.arguments import add_arguments, be_quiet, say, setting
from bench.end_to_end.race import Row, race
from bench.end_to_end.rows import deal
from bench.end_to_end.weights import Weights
from bench.kl_steps import dense, ours
from bench.kl_steps.settings import SETTINGS
from sepo.tokens import MASK

LEAST = 3.0  # times as fast, and times less memory


def main(argv: Sequence[str] | None = None) -> int:
    rows = run(parser().parse_args(argv))
    return 1 if any(row.status != "measured" for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench.kl_steps", description=__doc__)
    add_arguments(found, rounds=3)
    found.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    return found


def run(args: argparse.Namespace) -> list[Row]:
    """Race a method after the other, print, append."""
    be_quiet()
    name = args.model or models.smollm2_here()
    model, tokenizer = models.load(name, args.device)
    weights, V = Weights(model), model.config.vocab_size
    pairs, about = models.pairs(args.data, tokenizer, V, args.max_length, args.pairs * args.rounds)
    say(f"{name}: {about}\n{args.rounds} rounds of {args.pairs}, at most {args.max_length} tokens")
    conditions = setting(args)
    say(*conditions)
    rounds = deal(pairs, args.rounds, args.pairs)
    rows = {
        method: raced(method, weights, rounds, bf16=not args.float32)
        for method in SETTINGS
        if method in args.methods
    }
    say("", table.legend('"tdpo2" or "sparsepo"'))
    for method, found in rows.items():
        say("", table.table(found, method))
    flat = [row for found in rows.values() for row in found]
    say("", table.bars(flat, *bars()))
    path = args.json or table.default_path(args.device, "kl-steps")
    more = dict(model=name, pairs=args.pairs, rounds=args.rounds, setting=conditions)
    table.append(flat, path, args.device, more)
    say(f"appended to {path}")
    return flat


def raced(method: str, weights: Weights, rounds: list[list], *, bf16: bool) -> list[Row]:
    if method == "sparsepo":  # the last of all: other methods have no gradient for it
        weights.add(MASK, ours.new_mask(weights))
    options = dict(bf16=bf16)
    contenders = [
        *dense.contenders(method, weights, rounds, **options),
        *ours.contenders(method, weights, rounds, **options),
    ]
    rows = race(contenders, weights, rounds, truth=dense.truth, tell=say)
    del contenders
    gc.collect()  # modules are cycles; the next method's memory is not to be theirs
    return rows


def bars() -> tuple[table.Bars, table.Bars]:
    faster = [(method, f"dense {method}", LEAST) for method in SETTINGS]
    faster.insert(1, ("tdpo2, cached rows", "dense tdpo2", LEAST))
    faster += [(f"{method}, cheap again", f"dense {method}", LEAST) for method in SETTINGS]
    again = [
        (f"{method}, checkpointing", f"dense {method}, checkpointing", LEAST) for method in SETTINGS
    ]
    return tuple(faster), (*faster, *again)


if __name__ == "__main__":
    raise SystemExit(main())
