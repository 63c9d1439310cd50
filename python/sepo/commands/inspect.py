"""`sepo inspect`: rows as the trainer will read them, and what became of all the others."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np

from sepo.data.counts import count_rows, count_tokens
from sepo.data.segments import make_segments
from sepo.data.selection import FirstToken, Selection
from sepo.data.types import CutPair, Segment, TokenPair
from sepo.errors import InputError
from sepo.flags.options import say_idle, share, whole_number
from sepo.flags.reading import add_reading_flags, read_data, say_idle_of_a_store
from sepo.flags.selection import Select, selection_flags
from sepo.terminal import escaped, say, write

SIDES = ("chosen", "rejected")
FIELDS = ("prompt", *SIDES)
READING = ("dataset_split", "dataset_config", "limit", "max_length", "append_eos")
USUAL = Selection("selected")
SELECTION = {  # flags, as they are where they were not given
    "select": "fraction", "rejected_select": None, "fraction": USUAL.fraction,
    "rejected_fraction": None, "mass": USUAL.mass, "first_token": USUAL.first_token,
}  # fmt: skip
LEGEND = (
    "| ends a part, {mark} marks a selected token, ┊ follows the last token that is read "
    "after truncation"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sepo inspect`."""
    dataset = "preference data (a file or hub id), or a scored store"
    add_reading_flags(parser, required=False, dataset=dataset)
    for field in FIELDS:
        text = f"the data's own name for `{field}`"
        parser.add_argument(f"--{field}_key", metavar="COLUMN", help=text)
    add = parser.add_argument
    add("data", nargs="?", help=argparse.SUPPRESS)  # what --dataset_name was
    add("--model_name_or_path", metavar="MODEL", help="whose tokenizer reads the data")
    add(
        "--verify",
        nargs="?",
        const=True,
        metavar="PATH",
        help="read all of a store or checkpoint and compare it with its checksums; nothing else",
    )
    add("--rows", type=whole_number(0), default=3, help="rows to show")
    add = parser.add_argument_group("selection, for a scored store").add_argument
    kinds = get_args(Select)
    add(
        "--select",
        choices=kinds,
        default=SELECTION["select"],
        help="of the tokens, or of their scores",
    )
    add("--rejected_select", choices=kinds, help="the same for rejected responses, if different")
    add(
        "--fraction",
        type=share,
        default=SELECTION["fraction"],
        help="of the tokens selected",
    )
    add("--rejected_fraction", type=share, help="the same for rejected responses")
    add(
        "--mass",
        type=share,
        default=SELECTION["mass"],
        help="share of the score selected by mass",
    )
    add(
        "--first_token",
        choices=get_args(FirstToken),
        default=SELECTION["first_token"],
        help="released: as the released code, which never selects the first token of a response",
    )


def run(args: argparse.Namespace) -> None:
    """Print the first rows, then the counts of everything kept, cut and dropped; or verify files.

    Raises InputError as `read_pairs`, `ScoredStore.open` and `verify_store` do.
    """
    _move_data(args)
    if args.verify is not None:
        return _verify(args.verify)
    if args.dataset_name is None:
        raise InputError("--dataset_name: expected the data to look at, got none")
    if args.model_name_or_path is None:
        raise InputError("--model_name_or_path: expected whose tokenizer reads the data, got none")
    from sepo.model.load import load_tokenizer

    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    show = Show(tokenizer, sys.stdout, Selection("selected", **selection_flags(args)))
    from sepo.data.store.store import ScoredStore, is_store

    if is_store(args.dataset_name):
        unread = [f"{field}_key" for field in FIELDS]
        say_idle_of_a_store(args, args.dataset_name, *READING, *unread)
        store = ScoredStore.open(args.dataset_name, tokenizer)
        for i in range(min(args.rows, len(store))):
            show.pair(store[i])
        show.totals(list(store.pairs()))
        return
    keys = {field: getattr(args, f"{field}_key") for field in FIELDS}
    data = read_data(args, tokenizer, fields={field: key for field, key in keys.items() if key})
    if all(pair.chosen_weight is None for pair in data.pairs):
        given = [name for name, usual in SELECTION.items() if getattr(args, name) != usual]
        why = f"{args.dataset_name} has no scores to select by"
        say_idle([f"--{name} does nothing: {why}" for name in given])
    for pair, notes in zip(data.pairs[: args.rows], data.notes, strict=False):
        show.pair(pair, notes)
    show.totals(data.pairs)
    show.line(escaped(str(data.report)))


def _move_data(args: argparse.Namespace) -> None:
    """Say once where DATA, which had no flag, belongs now; a path of --verify is its own."""
    given = args.dataset_name if args.verify in (None, True) else args.verify
    if args.data is not None and given is not None:
        raise InputError(f"expected one path, got {given} and {args.data}")
    if args.data is None:
        args.verify = given if args.verify is True else args.verify
    elif args.verify is not None:
        say_idle(["sepo inspect PATH --verify is now sepo inspect --verify PATH"])
        args.verify = args.data
    else:
        say_idle(["sepo inspect DATA is now sepo inspect --dataset_name DATA"])
        args.dataset_name = args.data


def _verify(path: str) -> None:
    from sepo.data.store.store import MANIFEST, is_store, verify_store
    from sepo.trainer.checkpoints import MARK, completed_step, why_torn

    if is_store(path):
        store = verify_store(path)
        size = f"{len(store)} pairs, {store.manifest['tokens']} tokens"
        how = "whole, but not all of it has checksums" if store.unchecked else "as it was written"
        say(f"{path}: {how}: {size}")
    elif os.path.isfile(Path(path) / MARK):
        if (reason := why_torn(Path(path))) is not None:
            raise InputError(f"{path} is not a complete checkpoint: {reason}")
        say(f"{path}: as it was written: step {completed_step(path)}")
    else:
        raise InputError(
            f"--verify: expected a scored store or a checkpoint, found no {MANIFEST} and no {MARK} "
            f"in {path}"
        )


class Show:
    """Writes pairs as text: colours on a terminal, brackets elsewhere."""

    def __init__(self, tokenizer: Any, out: TextIO, selection: Selection):
        self.tokenizer, self.out, self.selection = tokenizer, out, selection
        is_plain = not out.isatty() or "NO_COLOR" in os.environ
        # around a selected token; around what is there for context only
        self.mark = ("⟦", "⟧") if is_plain else ("\x1b[7m", "\x1b[0m")
        self.faint = ("", "") if is_plain else ("\x1b[2m", "\x1b[0m")
        self._has_legend = False

    def pair(self, pair: TokenPair, notes: Sequence[str] = ()) -> None:
        """One pair, with its selected tokens if it has scores, or weights of the user's own."""
        counts = f"{len(pair.prompt)} prompt, {len(pair.chosen)} chosen, {len(pair.rejected)}"
        self.line(escaped("; ".join([f"pair {pair.id}: {counts} rejected tokens", *notes])))
        self._part("prompt", self._faint(_visible(self._text(pair.prompt))))
        cut = self._cut(pair)
        for i, side in enumerate(SIDES):
            response = self._response(pair, side, cut and cut.responses[i])
            self._part(side, response)
        if cut and not self._has_legend:
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
        tokens = count_tokens(pairs, [make_segments(p, Selection("all")) for p in pairs])
        read = f"{tokens['padded_unshared']} tokens padded, {tokens['packed']} packed"
        selects = [(p, s) for p in pairs if (s := self._cut(p))]
        if selects:
            segments = [cut for _, cut in selects]
            rows = count_rows([p for p, _ in selects], segments)
            share = rows["selected"] / rows["response"]
            sides = ", ".join(
                f"{sum(len(s.responses[i].positions) for _, s in selects)}"
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

    def _cut(self, pair: TokenPair) -> CutPair | None:
        """The pair as training reads it; None if nothing selects in one of the responses."""
        for side in SIDES:
            if getattr(pair, f"{side}_weight") is None:
                if getattr(pair, f"{side}_score", None) is None:
                    return None
        return make_segments(pair, self.selection)

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
        edges = sorted({0, len(ids), stop, *(np.flatnonzero(np.diff(selected)) + 1).tolist()})
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
