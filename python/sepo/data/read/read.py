"""A data set, on disk or on the hub, as tokenised pairs and a report of what became of its rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from sepo.data.read.formats import Format, Preference, find_format, read_row
from sepo.data.read.load import load_rows, source_name
from sepo.data.read.reasons import DroppedRow
from sepo.data.read.rows import Rows
from sepo.data.read.tokenise import tokenise
from sepo.data.types import TokenPair
from sepo.errors import InputError

BATCH = 512  # rows tokenised at once: enough to keep the tokenizer's threads busy

REPEATED_ID = "an id seen before, made unique by the row's number"


@dataclass
class Report:
    """How many rows were read, kept and dropped, and what was done to those kept."""

    source: str
    format: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # why -> rows
    noted: Counter[str] = field(default_factory=Counter)  # what -> kept rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # why or what -> the first ids
    details: dict[str, str] = field(default_factory=dict)  # why -> what the first one said

    def as_dict(self) -> dict[str, Any]:
        """The counts alone, for a manifest or a log."""
        return {
            "source": self.source,
            "format": self.format,
            "read": self.read,
            "kept": self.kept,
            "dropped": {str(why): count for why, count in self.dropped.items()},
            "noted": {str(what): count for what, count in self.noted.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.format})", f"{self.read:8} rows read"]
        for head, counts in (("dropped", self.dropped), ("kept", self.noted)):
            total = self.kept if head == "kept" else sum(counts.values())
            lines.append(f"{total:8} {head}")
            for what, count in counts.most_common():
                ids = ", ".join(self.examples[what]).replace("\n", "\\n")  # of one line
                ids += ", ..." if count > 3 else ""
                detail = f" [{self.details[what]}]" if what in self.details else ""
                lines.append(f"{count:12} {what}{detail} (pair {ids})")
        return "\n".join(lines)

    def drop(self, drop: DroppedRow) -> None:
        """Count a row that was dropped."""
        self._count(self.dropped, drop.why, drop.id)
        if drop.detail:
            self.details.setdefault(drop.why, drop.detail)

    def note(self, what: str, id: str) -> None:
        """Count something that was done to a row."""
        self._count(self.noted, what, id)

    def _count(self, counts: Counter[str], what: str, id: str) -> None:
        counts[what] += 1
        ids = self.examples.setdefault(what, [])
        if len(ids) < 3:
            ids.append(id)


@dataclass(frozen=True)
class PairSet:
    """The pairs of a data set in its order, and the report of how they came about."""

    pairs: list[TokenPair]
    notes: list[tuple[str, ...]]  # for each pair, what was done to it
    report: Report

    def __len__(self) -> int:
        return len(self.pairs)


def read_pairs(
    source: Any,  # a json, jsonl, csv or parquet file, a saved directory, a hub id, or rows
    tokenizer: Any,  # a fast transformers tokenizer; None will do for token ids
    *,
    split: str | None = None,  # None: train
    config: str | None = None,  # the hub's name for a part of the data set
    fields: Mapping[str, str] | None = None,  # e.g. {"chosen": "better"}: the data's own names
    max_length: int | None = None,  # tokens of the prompt and one response
    append_eos: bool = True,  # plain text only
    strict: bool = False,  # drop every row that would be kept with a note
    limit: int | None = None,  # rows to read, not pairs to keep
    skip: int = 0,  # rows to leave out at the start
    progress: bool = False,
) -> PairSet:
    """Read and tokenise every row; what cannot be used is dropped, counted and named.

    The rules for prompt and response are those of `sepo.data.read.tokenise.tokenise`; the formats are
    those of `sepo.data.read.formats.FORMATS`. Raises InputError for a source that is not there or
    cannot be read, for columns of no known format, for a value of the wrong type (naming row and
    field), and if no row is left.
    """
    rows = load_rows(source, split=split, config=config, limit=limit, skip=skip)
    form = find_format(rows.column_names, fields=fields)
    name = source_name(source)
    report = Report(name, form.name, read=len(rows))
    result = PairSet([], [], report)
    named = named_rows(rows, form, first=skip, fields=fields)
    for _ in _starts(len(rows), progress):
        batch: list[Preference] = []
        for one, own_id in islice(named, BATCH):
            if one.id != own_id:
                report.note(REPEATED_ID, own_id)
            if isinstance(one, DroppedRow):
                report.drop(one)
            else:
                batch.append(one)
        for done in tokenise(
            batch, tokenizer, max_length=max_length, append_eos=append_eos, strict=strict
        ):
            if isinstance(done, DroppedRow):
                report.drop(done)
                continue
            result.pairs.append(done.pair)
            result.notes.append(done.notes)
            report.kept += 1
            for what in done.notes:
                report.note(what, done.pair.id)
    if not result.pairs:
        why = "; ".join(
            f"{count} {why}" + (f" [{report.details[why]}]" if why in report.details else "")
            for why, count in report.dropped.most_common()
        )
        raise InputError(f"no row of {name} can be used: {why}")
    return result


def named_rows(
    rows: Rows,
    form: Format,
    *,
    first: int = 0,  # number of the first row
    fields: Mapping[str, str] | None = None,
) -> Iterator[tuple[Preference | DroppedRow, str]]:
    """Each row read, under an id that no other has, and the id that the data gave it.

    Raises InputError as `read_row` does, with the file that the row is in.
    """
    ids: set[str] = set()
    for number, row in enumerate(rows, start=first):
        try:
            one = read_row(row, number, form, fields=fields)
        except InputError as error:
            raise InputError(f"{rows.source(number - first)}: {error}") from error
        own_id = one.id
        if own_id in ids:  # two rows of one name could not be told apart in a store
            one = replace(one, id=f"{own_id}#{number}")
        ids.add(one.id)
        yield one, own_id


def _starts(count: int, progress: bool) -> Iterable[int]:
    """The first row of each batch, behind a bar if one is wanted."""
    starts = range(0, count, BATCH)
    if not progress:
        return starts
    from tqdm import tqdm

    return tqdm(starts, desc="tokenise", unit="batch")
