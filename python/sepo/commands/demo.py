"""`sepo demo`: the whole method on a small real model, on this machine."""

import argparse
from pathlib import Path

from sepo.demo import DATA
from sepo.demo.run import run_demo
from sepo.flags.options import positive, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sepo demo`."""
    add = parser.add_argument
    place = Path("runs/demo")
    add("--output_dir", type=Path, metavar="DIR", default=place, help="where all of it is written")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with pairs.jsonl, heldout.jsonl and heldout_openings.txt. Default: the demo's",
    )
    add("--oracle_pairs", type=positive, default=160, help="pairs that the oracle is trained on")
    add("--per_opening", type=positive, default=4, help="fresh samples of each held-out opening")
    add("--seed", type=seed, default=0, help="of the order of the pairs and of the samples")


def run(args: argparse.Namespace) -> None:
    """Run every stage, print a table and write summary.json. Raises InputError for missing data."""
    run_demo(
        args.output_dir,
        DATA if args.data is None else args.data,
        oracle_pairs=args.oracle_pairs,
        per_opening=args.per_opening,
        seed=args.seed,
    )
