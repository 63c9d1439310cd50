"""The flags that say how preference data is read, and the reading: the same in every command."""

import argparse
from typing import Any

from sepo.data.read.read import PairSet, read_pairs
from sepo.flags.options import positive, say_idle, whole_number

USUAL = {"dataset_split": "train", "append_eos": True}  # any other flag: not given


def add_reading_flags(parser: argparse.ArgumentParser, *, dataset: str, required: bool) -> None:
    """Add --dataset_name, which means `dataset` here, and what else says how it is read."""
    from transformers.hf_argparser import string_to_bool

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", required=required, metavar="DATA", help=dataset)
    add("--dataset_config", metavar="NAME", help="configuration of a hub data set")
    add("--dataset_split", metavar="NAME", default="train", help="split of a hub data set")
    add("--limit", type=positive, help="rows to read; all of them if not given")
    add(
        "--max_length",
        type=whole_number(2),
        help="tokens of a prompt and one response; longer responses are cut, and counted",
    )
    add(
        "--append_eos",
        type=string_to_bool,
        metavar="true|false",
        default=True,
        help="end plain-text responses with the tokenizer's end token",
    )
    add("--strict", action="store_true", help="drop every row that would be kept with a note")
    add(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with a model or tokenizer",
    )


def read_data(
    args: Any,  # of a parser with the flags above, or a SePOConfig
    tokenizer: Any,
    *,
    name: str | None = None,  # None: --dataset_name
    split: str | None = None,  # None: --dataset_split
    **more,  # arguments of read_pairs
) -> PairSet:
    """Read the data that `args` names as it says. Raises InputError as `read_pairs` does."""
    return read_pairs(
        args.dataset_name if name is None else name,
        tokenizer,
        **rows_of(args) | ({} if split is None else {"split": split}),
        **tokens_of(args),
        **more,
    )


def rows_of(args: Any) -> dict:
    """Which rows are read: arguments of `read_pairs` and `load_rows`."""
    return {
        "split": args.dataset_split,
        "config": args.dataset_config,
        "limit": getattr(args, "limit", None),  # training reads all
    }


def tokens_of(args: Any) -> dict:
    """Collect the arguments of `read_pairs` that say what becomes of a row's text."""
    return {name: getattr(args, name) for name in ("max_length", "append_eos", "strict")}


def say_idle_of_a_store(args: argparse.Namespace, store: str, *names: str) -> None:
    """One line of warning for each of these flags that was given, though a store is not read so."""
    given = [name for name in names if getattr(args, name) != USUAL.get(name)]
    why = f"{store} is a scored store, whose pairs are taken as they are"
    say_idle([f"--{name} does nothing: {why}" for name in given])
