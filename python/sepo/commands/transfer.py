"""`sepo transfer`: an oracle's scores in the tokens of another tokenizer."""

import argparse
from typing import get_args

from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.flags.options import positive, share
from sepo.flags.reading import add_reading_flags, read_data, rows_of
from sepo.model.load import load_tokenizer
from sepo.system.lock import lock
from sepo.terminal import say
from sepo.transfer.row import Aggregate, Mode
from sepo.transfer.store import FRACTION, OWNER, read_preferences, transfer_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sepo transfer`."""
    add_reading_flags(
        parser, required=True, dataset="the data that was scored: a hub id or local path"
    )
    add = parser.add_argument
    add("--scores", required=True, help="a store that `sepo score` wrote")
    add("--oracle", required=True, help="the model that scored it, or its reference: its tokenizer")
    add("--model_name_or_path", required=True, help="the policy: its tokenizer and chat template")
    add("--output_dir", required=True, metavar="DIR", help="the scored store that is written")
    add("--mode", choices=get_args(Mode), default="score", help="what is carried")
    add(
        "--aggregate",
        choices=get_args(Aggregate),
        help="score: a token's score from its bytes'; max is min in rejected responses; "
        "default mean",
    )
    add("--fraction", type=share, help=f"overlap: of the oracle's tokens; default {FRACTION}")
    add("--pairs_per_part", type=positive, default=128)


def run(args: argparse.Namespace) -> None:
    """Transfer a store. Raises InputError as `transfer_store` and `read_pairs` do."""
    for name, mode in (("aggregate", "score"), ("fraction", "overlap")):
        if getattr(args, name) is not None and args.mode != mode:
            raise InputError(f"--{name}: expected with --mode {mode}, got --mode {args.mode}")
    with lock(args.output_dir, OWNER):  # before anything is loaded
        _transfer(args)


def _transfer(args: argparse.Namespace) -> None:
    code = dict(trust_remote_code=args.trust_remote_code)
    tokenizers = [load_tokenizer(path, **code) for path in (args.oracle, args.model_name_or_path)]
    store = ScoredStore.open(args.scores)
    data = read_data(args, tokenizers[1], progress=True)
    say(str(data.report))
    coverage = transfer_store(
        store,
        data,
        read_preferences(args.dataset_name, **rows_of(args)),
        args.output_dir,
        oracle_tokenizer=tokenizers[0],
        policy_tokenizer=tokenizers[1],
        mode=args.mode,
        aggregate=args.aggregate or "mean",
        fraction=FRACTION if args.fraction is None else args.fraction,
        pairs_per_part=args.pairs_per_part,
        max_length=args.max_length,
    )
    say(str(coverage))
    say(f"complete store: {args.output_dir}")
