"""`sepo score`: its flags, and the models and pairs they name."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from sepo.data.store.store import ScoredStore, is_store, tokenizer_hash
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.flags.dtype_note import warn_if_slow
from sepo.flags.options import device, positive, say_idle, whole_number
from sepo.flags.reading import add_reading_flags, read_data, say_idle_of_a_store
from sepo.flags.renamed import say_renamed
from sepo.model.budget import scoring_budget
from sepo.model.folder import find_folder
from sepo.model.load import load_tokenizer
from sepo.model.reference import cached_reference
from sepo.model.sharing import Wanted, load_sharing
from sepo.score.arithmetic import ARITHMETICS, AUTO
from sepo.score.score import KEEP, SAMPLE, score_dataset, shard_name
from sepo.system.lock import lock
from sepo.terminal import release_warnings, say

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # of other arithmetics float32
BESIDE = {"split": 1, "tf32x3": 2, AUTO: 2}  # bytes of halves, at most, over those of the weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sepo score`."""
    add_reading_flags(
        parser,
        required=True,
        dataset="hub id or local path of preference pairs; or a store that keeps logp of them, "
        "which is taken as it is: then the reference is not run again",
    )
    add = parser.add_argument
    add(
        "--reference",
        required=True,
        help="the model the oracle started from; its tokenizer is used",
    )
    add("--oracle", help="the trained model; without it only log-probabilities can be kept")
    add("--output_dir", required=True, metavar="DIR", help="the scored store that is written")
    add(
        "--keep",
        nargs="+",
        action="extend",
        default=[],
        choices=KEEP[1:],
        help="also keep the reference's log-probabilities (logp, for dpo), its states (hidden)",
    )
    for role in ("", "oracle_", "reference_"):
        whose = f"of the {role[:-1]}" if role else "of both models"
        names = ARITHMETICS if role else (AUTO, *ARITHMETICS)
        add(f"--{role}arithmetic", choices=names, help=_about_arithmetic(whose, with_auto=not role))
        add(
            f"--{role}dtype",
            action=_Renamed,
            dest=f"{role}arithmetic",
            choices=("float32", *DTYPES),
            help=argparse.SUPPRESS,
        )
        add(f"--{role}device", type=device, help=f"device {whose}; cuda if there is one, else cpu")
    add(
        "--max_tokens_per_batch",
        type=positive,
        help="tokens of one batch; what a GPU's memory holds, up to 65536, if not given; 8192 "
        "elsewhere",
    )
    add("--pairs_per_part", type=positive, default=128, help="what a killed run repeats at most")
    add("--shard", type=_shard, metavar="i/n", help="score every n-th part only; RANK/WORLD_SIZE")
    add(
        "--precision_check",
        type=whole_number(0),
        help=f"score n pairs in float32 too and compare; {SAMPLE} if another arithmetic is taken, "
        "0: never",
    )


class _Renamed(argparse.Action):
    """Take an old flag's value under its new name, and say that once."""

    def __call__(self, parser, namespace, values, option_string=None):
        say_renamed([f"{option_string} is now --{self.dest}"])
        setattr(namespace, self.dest, values)


def _about_arithmetic(whose: str, *, with_auto: bool) -> str:
    about = f"in what the products {whose} are made; float32 if not given"
    if not with_auto:
        return about
    return (
        f"{about}. split: of bfloat16 halves, tf32x3: of TF32's; auto: the fastest of these on this "
        "device that selects as float32 does, tried on the pairs of --precision_check"
    )


def run(args: argparse.Namespace) -> None:
    """`sepo score`. Raises InputError as `score_dataset` does, and for tokenizers that differ.

    A data set that is a store with the reference's log-probabilities spares its pass, and the
    memory of its weights; `cached_reference` says when it is another reference's.
    """
    if args.oracle is None and not args.keep:
        raise InputError("expected --oracle, which a score needs, or --keep logp or hidden")
    with lock(args.output_dir, shard_name(args.shard)):  # before the models are loaded
        _score(args)


def _score(args: argparse.Namespace) -> None:
    code = dict(trust_remote_code=args.trust_remote_code)
    folders = {
        role: find_folder(path, **code)
        for role in ("reference", "oracle")
        if (path := getattr(args, role)) is not None
    }
    for role, folder in folders.items():
        say(f"{role}: {folder}")
    tokenizer = load_tokenizer(args.reference, **code)
    if args.oracle is not None:
        _check_same_tokenizer(args, tokenizer)
    arithmetics = {
        role: getattr(args, f"{role}_arithmetic") or args.arithmetic or "float32"
        for role in ("reference", "oracle")
    }
    dtypes = {role: DTYPES.get(name, torch.float32) for role, name in arithmetics.items()}
    data = _read(args, tokenizer, dtypes["reference"])
    wanted = {}
    slow = {}  # by device
    for role, dtype in dtypes.items():
        place = getattr(args, f"{role}_device") or args.device or _default_device()
        if not getattr(args, role) or (role == "reference" and data.has_reference):
            continue
        wanted[role] = Wanted(folders[role], dtype, place)
        if dtype == torch.bfloat16:
            own = f"{role}_" * (getattr(args, f"{role}_arithmetic") is not None)
            slow[place] = f"--{own}arithmetic bfloat16"
    models = load_sharing(wanted)
    for place, flag in slow.items():
        warn_if_slow(flag, place)
    if args.oracle is None:
        given = [flag for flag in ("oracle_arithmetic", "oracle_device") if getattr(args, flag)]
        say_idle([f"--{flag} does nothing without --oracle" for flag in given])
    tokens = args.max_tokens_per_batch
    if tokens is None:
        itemsize = max(dtypes[role].itemsize for role in models)
        beside = max(BESIDE.get(name, 0) for name in arithmetics.values())
        tokens, why = scoring_budget(models, itemsize, beside)
        say(f"batches: {why}")
    wants_score = args.oracle is not None or not args.keep
    release_warnings()
    score_dataset(
        data.pairs,
        args.output_dir,
        reference=models.get("reference"),
        oracle=models.get("oracle"),
        tokenizer=tokenizer,
        keep=["score"] * wants_score + args.keep,
        max_tokens=tokens,
        pairs_per_part=args.pairs_per_part,
        shard=args.shard,
        arithmetic=arithmetics,
        precision_check=args.precision_check,
        report=data.report,
        max_length=data.max_length,
    )


@dataclass(frozen=True)
class _Data:
    """Pairs to score, and what the manifest tells of how they were read."""

    pairs: Sequence[TokenPair]
    report: dict | None
    max_length: int | None
    has_reference: bool  # all that scoring asks of it


def _read(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> _Data:
    name = args.dataset_name
    if not is_store(name):
        data = read_data(args, tokenizer, progress=True)
        say(str(data.report))
        return _Data(data.pairs, data.report.as_dict(), args.max_length, has_reference=False)
    for flag in ("limit", "max_length", "strict"):
        if getattr(args, flag):
            raise InputError(
                f"--{flag}: {name} is a scored store, whose pairs are taken as they are"
            )
    say_idle_of_a_store(args, name, "dataset_split", "dataset_config", "append_eos")
    store = ScoredStore.open(name, tokenizer)
    how = dict(keep="logp", dtype=dtype, trust_remote_code=args.trust_remote_code)
    kept = cached_reference(args.reference, {name: store}, tokenizer, **how)
    # its states are written by a pass of the model, which says the rest again
    has_reference = kept is not None and args.oracle is not None and "hidden" not in args.keep
    if has_reference:
        say(f"reference: not run, {name} keeps its log-probabilities")
    about = store.manifest
    return _Data(store, about["reading"], about["max_length"], has_reference)


def _check_same_tokenizer(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
    oracle = load_tokenizer(args.oracle, trust_remote_code=args.trust_remote_code)
    found, expected = tokenizer_hash(oracle), tokenizer_hash(tokenizer)
    if found != expected:
        raise InputError(
            f"oracle {args.oracle} and reference {args.reference} have different tokenizers "
            f"({found[:12]}, {expected[:12]}); a score needs both models on the same tokens"
        )


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"expected i/n, as in 0/4, got {text}")
    return index, count
