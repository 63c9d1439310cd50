"""`sepo inspect`: rows as the trainer will read them, and what became of all the others."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sepo.data.counts import count_rows, count_tokens
from sepo.data.segments import make_segments
from sepo.data.types import Segment, TokenPair
from sepo.errors import InputError
from sepo.flags.options import (
    positive,
    say_idle,
    say_idle_of_a_store,
    share,
    share_or_mass,
    whole_number,
)
from sepo.terminal import escaped, say, write

SIDES = ("chosen", "rejected")
FIELDS = ("prompt", *SIDES)
READING = ("split", "dataset_config", "limit", "max_length", "append_eos")
SELECTION = {"fraction": 0.3, "rejected_fraction": None, "mass": 0.8, "first_token": "paper"}
LEGEND = (
    "| ends a part, {mark} marks a selected token, ┊ follows the last token that is read "
    "after truncation"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sepo inspect`."""
    from transformers.hf_argparser import string_to_bool

    add = parser.add_argument
    add("data", metavar="DATA", help="preference data (a file or hub id), or a scored store")
    add("--model_name_or_path", help="whose tokenizer reads the data")
    add(
        "--verify",
        action="store_true",
        help="read all of a store or checkpoint and compare it with its checksums; nothing else",
    )
    add("--rows", type=whole_number(0), default=3, metavar="n", help="rows to show")
    one_of = dict(type=share_or_mass, metavar="NUMBER|mass")
    add(
        "--fraction",
        **one_of,
        default=SELECTION["fraction"],
        help="of the tokens selected, for a scored store",
    )
    add("--rejected_fraction", **one_of, help="the same for rejected responses, if different")
    add(
        "--mass",
        type=share,
        default=SELECTION["mass"],
        help="share of the score that --fraction mass selects",
    )
    add(
        "--first_token",
        choices=("paper", "official"),
        default=SELECTION["first_token"],
        help="official: as the released code, which never selects the first token of a response",
    )
    add("--max_length", type=whole_number(2), help="tokens of the prompt and one response")
    add("--split", default="train")
    add("--strict", action="store_true", help="drop every row that would be kept with a note")
    add("--dataset_config", help="configuration of a hub data set")
    add("--limit", type=positive, help="rows to read; all of them if not given")
    for field in FIELDS:
        add(f"--{field}_key", metavar="COLUMN", help=f"the data's own name for `{field}`")
    add("--append_eos", type=string_to_bool, default=True, help="end token after plain text")
    add("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")


def run(args: argparse.Namespace) -> None:
    """Print the first rows, then the counts of everything kept, cut and dropped; or verify files.

    Raises InputError as `read_pairs`, `ScoredStore.open` and `verify_store` do.
    """
    if args.verify:
        return _verify(args.data)
    if args.model_name_or_path is None:
        raise InputError("--model_name_or_path: expected whose tokenizer reads the data, got none")
    from sepo.model.prepare import load_tokenizer

    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    selection = {name: getattr(args, name) for name in SELECTION}
    show = Show(tokenizer, sys.stdout, **selection)
    from sepo.data.store.store import ScoredStore, is_store

    if is_store(args.data):
        keys = [f"{field}_key" for field in FIELDS]
        say_idle_of_a_store(args, args.data, *READING, *keys)
        store = ScoredStore.open(args.data, tokenizer)
        for pair in (store[i] for i in range(min(args.rows, len(store)))):
            show.pair(pair)
        show.totals(list(store.pairs()))
        return
    from sepo.data.read.read import read_pairs

    keys = {field: getattr(args, f"{field}_key") for field in FIELDS}
    data = read_pairs(
        args.data,
        tokenizer,
        split=args.split,
        config=args.dataset_config,
        fields={field: key for field, key in keys.items() if key},
        max_length=args.max_length,
        append_eos=args.append_eos,
        strict=args.strict,
        limit=args.limit,
    )
    if all(pair.chosen_weight is None for pair in data.pairs):
        given = [name for name, usual in SELECTION.items() if selection[name] != usual]
        why = f"{args.data} has no scores to select by"
        say_idle([f"--{name} does nothing: {why}" for name in given])
    for pair, notes in zip(data.pairs[: args.rows], data.notes, strict=False):
        show.pair(pair, notes)
    show.totals(data.pairs)
    show.line(escaped(str(data.report)))


def _verify(path: str) -> None:
    from sepo.data.store.store import MANIFEST, is_store, verify_store
    from sepo.trainer.checkpoints import MARK, read_mark, why_torn

    if is_store(path):
        store = verify_store(path)
        size = f"{len(store)} pairs, {store.manifest['tokens']} tokens"
        how = "whole, but not all of it has checksums" if store.unchecked else "as it was written"
        say(f"{path}: {how}: {size}")
    elif os.path.isfile(Path(path) / MARK):
        if (reason := why_torn(Path(path))) is not None:
            raise InputError(f"{path} is not a complete checkpoint: {reason}")
        say(f"{path}: as it was written: step {read_mark(path)['step']}")
    else:
        raise InputError(
            f"--verify: expected a scored store or a checkpoint, found no {MANIFEST} and no {MARK} "
            f"in {path}"
        )


class Show:
    """Writes pairs as text: colours on a terminal, brackets elsewhere."""

    def __init__(self, tokenizer: Any, out: TextIO, **selection):  # of make_segments
        self.tokenizer, self.out, self.selection = tokenizer, out, selection
        is_plain = not out.isatty() or "NO_COLOR" in os.environ
        # around a selected token; around what is there for context only
        self.mark = ("⟦", "⟧") if is_plain else ("\x1b[7m", "\x1b[0m")
        self.faint = ("", "") if is_plain else ("\x1b[2m", "\x1b[0m")
        self._has_legend = False

    def pair(self, pair: TokenPair, notes: Sequence[str] = ()) -> None:
        """One pair, with its selected tokens if it has scores, or weights of the user's own."""
        counts = f"{len(pair.prompt)} prompt, {len(pair.chosen)} chosen, {len(pair.rejected)}"
        self.line(escaped("; ".join([f"row {pair.id}: {counts} rejected tokens", *notes])))
        self._part("prompt", self._faint(_visible(self._text(pair.prompt))))
        segments = self._segments(pair)
        for i, side in enumerate(SIDES):
            response = self._response(pair, side, segments and segments[i])
            self._part(side, response)
        if segments and not self._has_legend:
            self.line(LEGEND.format(mark="".join(self.mark[:1]) + "this" + self.mark[1]))
            self._has_legend = True
        self.line("")

    def totals(self, pairs: Sequence[TokenPair]) -> None:
        """Tokens of all pairs, and how many of them packing, selection and truncation leave."""
        prompts = sum(len(p.prompt) for p in pairs)
        responses = sum(len(p.chosen) + len(p.rejected) for p in pairs)
        self.line(
            f"{len(pairs)} pairs: {prompts} prompt tokens (stored once), {responses} of responses"
        )
        tokens = count_tokens(pairs, [make_segments(p, "all") for p in pairs])
        read = f"{tokens['padded_unshared']} tokens padded, {tokens['packed']} packed"
        selects = [(p, s) for p in pairs if (s := self._segments(p))]
        if selects:
            segments = [(p.prompt, *s) for p, s in selects]
            rows = count_rows([p for p, _ in selects], segments)
            share = rows["selected"] / rows["response"]
            sides = ", ".join(
                f"{sum(len(s[i].positions) for _, s in selects)}"
                f" of {sum(len(getattr(p, side)) for p, _ in selects)} {side}"
                for i, side in enumerate(SIDES)
            )
            self.line(
                f"{rows['selected']} of {rows['response']} response tokens selected ({share:.1%}): "
                f"{sides}"
            )
            if len(selects) == len(pairs):
                read += (
                    f", {count_tokens(pairs, segments)['packed_truncated']} packed and truncated"
                )
        self.line(f"one pass over them reads {read}")

    def line(self, text: str) -> None:
        write(text, out=self.out)

    def _segments(self, pair: TokenPair) -> list[Segment] | None:
        """Both segments; None if nothing selects in one of the responses."""
        for side in SIDES:
            if getattr(pair, f"{side}_weight") is None:
                if getattr(pair, f"{side}_score", None) is None:
                    return None
        return list(make_segments(pair, "selected", **self.selection)[1:])

    def _part(self, name: str, text: str) -> None:
        self.line(f"  {name:9}{text}|".replace("\n", "\n" + " " * 11))

    def _faint(self, text: str) -> str:
        return self.faint[0] + text + self.faint[1]

    def _text(self, ids: np.ndarray) -> str:  # (T,) int32
        return self.tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _response(self, pair: TokenPair, side: str, segment: Segment | None) -> str:
        ids = getattr(pair, side)
        selected = np.zeros(len(ids), dtype=bool)
        stop = len(ids)
        if segment is not None:
            selected[segment.positions] = True
            stop = len(segment.response)  # one before the last selected token: a target, not read
        edges = {0, len(ids), stop, *(np.flatnonzero(np.diff(selected)) + 1).tolist()}
        edges = sorted(edges)
        text = ""
        for start, end in zip(edges, edges[1:], strict=False):
            run = _visible(self._run(pair.prompt, ids, start, end))
            if selected[start]:
                run = self.mark[0] + run + self.mark[1]
            elif start > stop:
                run = self._faint(run)
            text += ("┊" if start == stop and segment is not None else "") + run
        return text

    def _run(self, prompt: np.ndarray, ids: np.ndarray, start: int, end: int) -> str:
        """The text that tokens [start, end) add to all before them: alone they may lose a blank."""
        before = self._text(np.concatenate([prompt, ids[:start]])).rstrip("\ufffd")
        after = self._text(np.concatenate([prompt, ids[:end]]))
        return after[len(before) :]


def _visible(text: str) -> str:
    return escaped(text).replace("\n", "⏎\n")
