"""`sepo report`: one file that shows what an oracle scored and what a run made of it."""

import argparse
import json
import os
import sys
from pathlib import Path

from sepo.data.files import Atomic, check_folder
from sepo.data.store import MANIFEST, read_manifest
from sepo.errors import InputError, is_utf8
from sepo.options import whole_number
from sepo.report.charts import run_charts, store_charts
from sepo.report.collect import MAX_STORES, PAIRS, collect

FORMATS = ("html", "png", "json")


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
    add("-o", "--output", metavar="PATH", help="default: report.html; report, a folder, for png")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--format", choices=FORMATS, default="html", help="png: one file a figure")
    kinds.add_argument(
        "--json", action="store_const", const="json", dest="format", help="the numbers, to stdout"
    )
    add(
        "--pairs",
        type=whole_number(0),
        default=PAIRS,
        metavar="n",
        help="whose responses are shown",
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")


def run(args: argparse.Namespace) -> None:
    """Write the report. Raises InputError as `collect` does, and for an output it can't write."""
    tokenizers = [
        _tokenizer(path, name, args.trust_remote_code)
        for path, name in zip(args.stores, _names(args), strict=True)
    ]
    data = collect(args.stores, tokenizers, args.runs, max_pairs=args.pairs)
    if args.format == "png":
        from sepo.report.png import write_pngs

        charts = store_charts(data) + run_charts(data["runs"])
        folder = Path(args.output or "report")
        check_folder(folder, "--output")
        files = write_pngs(charts, folder)
        print(f"{folder}: {len(files)} figures")
        return
    if args.format == "json":
        # escapes that JSON knows where stdout can't show a letter
        ascii_only = args.output is None and not is_utf8(sys.stdout)
        text = json.dumps(data, ensure_ascii=ascii_only, allow_nan=False) + "\n"
        if args.output is None:
            sys.stdout.write(text)
            return
    else:
        from sepo.report.page import render_page

        text = render_page(data)
    _write(Path(args.output or "report.html"), text)


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
    from sepo.model import load_tokenizer

    manifest = read_manifest(Path(store))
    if manifest is None:
        raise InputError(f"{store}: expected a scored store, found no {MANIFEST}")
    if name is None and not (name := manifest.get("tokenizer_name")):
        raise InputError(f"{store}: doesn't say whose tokenizer made it; --model_name_or_path does")
    return load_tokenizer(name, trust_remote_code=trust_remote_code)


def _write(path: Path, text: str) -> None:
    _refuse(path, path.is_dir(), "a file to write, got a folder")
    check_folder(path.parent, "--output")
    path.parent.mkdir(parents=True, exist_ok=True)
    with Atomic(path, str(os.getpid())) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{path}: {len(text.encode()) / 1e6:.1f} MB")


def _refuse(path: Path, is_wrong: bool, wanted: str) -> None:
    if is_wrong:
        raise InputError(f"{path}: expected {wanted}")
