"""`sepo report`: one file that shows what an oracle scored and what a run made of it."""

import argparse
import glob
import json
import os
from pathlib import Path

from sepo.data.store.store import MANIFEST, read_manifest
from sepo.errors import InputError
from sepo.flags.options import whole_number
from sepo.report.charts import run_charts, store_charts
from sepo.report.collect import MAX_STORES, PAIRS, collect
from sepo.system.files import Atomic, clear
from sepo.system.lock import lock
from sepo.terminal import say

FORMATS = ("html", "png", "json")
OWNER = "sepo-report-"  # of temporary files and locks, before the number of the process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sepo report`."""
    add = parser.add_argument
    add("stores", nargs="*", metavar="STORE", help="scored store; two are shown side by side")
    add(
        "--run",
        dest="runs",  # `run` is the command's own function
        action="append",
        default=[],
        metavar="DIR",
        help="output folder of a training run; may be repeated, all share the figures",
    )
    add(
        "--model_name_or_path",
        action="append",
        metavar="NAME",
        help="whose tokenizer made the store; once for all or once a store. Default: as stored",
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="the file, a folder for png. Default: report.html; report for png",
    )
    places.add_argument("--output_dir", metavar="DIR", help="the folder that it is written to")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--format", choices=FORMATS, default="html", help="png: one file a figure")
    kinds.add_argument(
        "--json", action="store_const", const="json", dest="format", help="the numbers, to stdout"
    )
    add(
        "--pairs",
        type=whole_number(0),
        default=PAIRS,
        help="whose responses are shown",
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")


def run(args: argparse.Namespace) -> None:
    """Write the report. Raises InputError as `collect` does, and for an output it can't write."""
    if args.format == "json" and args.output is None and args.output_dir is None:
        say(json.dumps(_collect(args), allow_nan=False))  # of ASCII alone
        return
    is_folder = args.format == "png"
    path = Path(args.output or _usual_output(args.output_dir, args.format))
    if not is_folder and os.path.exists(path) and not os.path.isfile(path):
        # a page takes the place of what is there: of a device that all programs use, too
        found = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise InputError(f"{path}: expected a file to write, got {found}")
    folder, owner = path if is_folder else path.parent, f"{OWNER}{os.getpid()}"
    with lock(folder, owner):  # before anything is read: it refuses what can't be written to
        temporaries = "*.png" if is_folder else glob.escape(path.name)
        clear(folder, owner, temporaries=f".{temporaries}.*.tmp", locks=f".{OWNER}*.lock")
        data = _collect(args)
        if is_folder:
            from sepo.report.png import write_pngs

            files = write_pngs(store_charts(data) + run_charts(data["runs"]), path, owner=owner)
            say(f"{path}: {len(files)} figures")
            return
        from sepo.report.html import render_page

        if args.format == "json":
            text = json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"
        else:
            text = render_page(data)
        encoded = text.encode("utf-8", "backslashreplace")  # half of a surrogate has no bytes
        with Atomic(path, owner) as temporary:
            temporary.write_bytes(encoded)
    say(f"{path}: {len(encoded) / 1e6:.1f} MB")


def _usual_output(folder: str | None, kind: str) -> Path:
    if folder is None:
        return Path("report" if kind == "png" else "report.html")
    return Path(folder) if kind == "png" else Path(folder) / f"report.{kind}"


def _collect(args: argparse.Namespace) -> dict:
    tokenizers = [
        _tokenizer(path, name, args.trust_remote_code)
        for path, name in zip(args.stores, _names(args), strict=True)
    ]
    return collect(args.stores, tokenizers, args.runs, max_pairs=args.pairs)


def _names(args: argparse.Namespace) -> list[str | None]:
    """One tokenizer a store; None: what the store says."""
    if len(args.stores) > MAX_STORES:
        raise InputError(f"expected at most {MAX_STORES} stores, got {len(args.stores)}")
    names = args.model_name_or_path or [None]
    if len(names) not in (1, len(args.stores)):
        raise InputError(
            f"--model_name_or_path: expected one name, or one a store ({len(args.stores)}), "
            f"got {len(names)}"
        )
    return names * len(args.stores) if len(names) == 1 else names


def _tokenizer(store: str, name: str | None, trust_remote_code: bool):
    from sepo.model.load import load_tokenizer

    manifest = read_manifest(Path(store))
    if manifest is None:
        raise InputError(f"{store}: expected a scored store, found no {MANIFEST}")
    if name is None and not (name := manifest.get("tokenizer_name")):
        raise InputError(f"{store}: doesn't say whose tokenizer made it; --model_name_or_path does")
    return load_tokenizer(name, trust_remote_code=trust_remote_code)
