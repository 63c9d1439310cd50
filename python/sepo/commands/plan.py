"""`sepo plan`: what a run will cost, before it is run. Modelled, not measured."""

import argparse
from pathlib import Path

from sepo.errors import InputError
from sepo.flags.options import positive, whole_number
from sepo.terminal import say

BATCHES = ("max_length", "pairs", "steps", "budgets", "world_sizes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sepo plan`: one of three questions."""
    add = parser.add_argument
    add(
        "config", nargs="?", type=Path, metavar="CONFIG",
        help="a recipe, with the GPUs and the mean lengths: GPU-hours of each stage",
    )  # fmt: skip
    add("--papers", action="store_true", help="GPU-hours of SePO's paper, and where they go")
    group = parser.add_argument_group("how full and how even micro-batches are")
    add = group.add_argument
    add("--dataset_name", metavar="DATA", help="whose lengths are planned (a file or hub id)")
    add("--model_name_or_path", metavar="M", help="a folder: its tokenizer, its attention's share")
    add("--max_length", type=whole_number(2), help="tokens of the prompt and one response")
    add("--pairs", type=positive, help="lengths to plan, default 1000000")
    add("--steps", type=positive, help="steps to look at, default 200")
    add("--budgets", type=positive, nargs="+", help="tokens of a micro-batch, several")
    add("--world_sizes", type=positive, nargs="+", help="numbers of ranks, default 1 2 8")


def run(args: argparse.Namespace) -> None:
    """Print the answer. Raises InputError for none or two questions, and as each answer does."""
    asked = [x for x in (args.config, args.papers, args.dataset_name) if x]
    if len(asked) != 1:
        raise InputError(f"expected CONFIG, --papers or --dataset_name, got {len(asked)} of them")
    check_flags(args)
    if args.config:
        from sepo.cost.planner import plan

        say(plan(args.config))
    elif args.papers:
        from sepo.cost.tables import table1

        say(table1())
    else:
        from sepo.cost.batches import show

        given = {name: getattr(args, name) for name in BATCHES}
        show(
            args.dataset_name,
            args.model_name_or_path,
            **{name: value for name, value in given.items() if value is not None},
        )


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for a flag of another question, and for data without a model."""
    if args.dataset_name is None:
        for name in ("model_name_or_path", *BATCHES):
            if getattr(args, name) is not None:
                raise InputError(f"--{name}: expected --dataset_name with it, got none")
    elif args.model_name_or_path is None:
        raise InputError("--model_name_or_path: expected whose tokenizer reads the data, got none")
