"""Rows as their source has them, read again at each pass.

Text files are read here and not by way of the datasets library, which makes one table of all rows:
it gives a key that one row has to every row, parses dates, and widens numbers. A template prints
what it gets.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sepo.data.read import strict_json
from sepo.data.read.cells import kind, short
from sepo.errors import InputError

CELL = 2**31 - 1  # characters of a CSV's cell, of which Python's reader allows 131 072


class Rows:
    """So many rows with these columns; `read` gives all of them anew each time."""

    def __init__(
        self,
        read: Callable[[], Iterable[dict]],
        columns: Sequence[str] | None = None,  # None: whatever the rows have
        count: int | None = None,
        name: str = "the data set",
    ):
        if columns is None or count is None:
            columns, count = _survey(read())
        self.column_names = list(columns)
        self.sources = [(name, count)]  # what messages call them, and how many rows of each
        self._read, self._part = read, range(count)

    def __len__(self) -> int:
        return len(self._part)

    def __iter__(self) -> Iterator[dict]:
        """Each row with all columns, None where it has no such key."""
        unfilled = dict.fromkeys(self.column_names)
        for row in islice(self._read(), self._part.start, self._part.stop):
            yield row if len(row) == len(unfilled) else unfilled | row

    def __getitem__(self, column: str) -> list:
        return [row[column] for row in self]

    def select(self, part: range) -> "Rows":
        """A run of the rows."""
        chosen = copy(self)
        chosen._part = self._part[part.start : part.stop]
        return chosen

    def source(self, index: int) -> str:
        """Where the row comes from."""
        for name, count in self.runs():
            if index < count:
                return name
            index -= count
        raise IndexError(index)

    def runs(self) -> Iterator[tuple[str, int]]:
        """Each source of these rows, and how many come from it, in order."""
        start = 0
        for name, count in self.sources:
            part = self._part[
                max(0, start - self._part.start) : max(0, start + count - self._part.start)
            ]
            if len(part):
                yield name, len(part)
            start += count


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = dict.fromkeys(name for part in parts for name in part.column_names)
    whole = Rows(lambda: chain.from_iterable(parts), list(columns), sum(map(len, parts)))
    whole.sources = [run for part in parts for run in part.runs()]
    return whole


def in_memory(rows: Iterable[Any]) -> Rows:
    """Rows that someone made: dicts, in a list or in anything that can be walked through."""
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"pair {number}: expected a dict of columns, got {kind(row)}")
    return Rows(lambda: map(dict, rows))


# --- text files ----------------------------------------------------------------------------------


def json_file(path: Path) -> Rows:
    """Objects one a line, or a list of them. Raises InputError naming the line."""
    first = next((text.strip() for _, text in _lines(path) if text.strip()), "")
    if first.startswith("["):
        return _json_list(path)
    return Rows(lambda: _json_lines(path), name=str(path))


def _json_lines(path: Path) -> Iterator[dict]:
    for number, text in _lines(path):
        if not text.isspace():
            where = f"{path}, line {number}"
            yield _object(
                _json(text, where, "a JSON object on each line, or one list of them"), where
            )


def _json_list(path: Path) -> Rows:
    text = "".join(text for _, text in _lines(path))
    rows = _json(text, str(path), "a JSON list of objects, or an object on each line")
    for number, row in enumerate(rows, 1):
        _object(row, f"{path}, item {number}")
    return Rows(lambda: iter(rows), name=str(path))


def _json(text: str, where: str, expected: str) -> Any:
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" at place {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "msg", str(error))
        raise InputError(f"{where}: expected {expected}, got {reason}{place}") from error


def _object(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        got = short(row) if row is not None else "null"
        raise InputError(f"{where}: expected a JSON object of columns, got {got}")
    return row


def csv_file(path: Path, delimiter: str = ",") -> Rows:
    """Cells as texts: an answer "42" or "None" is neither a number nor null.

    Raises InputError naming the line: for a row of another number of cells, and for quotes that
    are not closed.
    """
    return Rows(lambda: _csv_rows(path, delimiter), name=str(path))


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict]:
    csv.field_size_limit(CELL)
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
    try:
        columns = next(reader, [])
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise InputError(f"{path}: expected each column once, got {twice[0]} twice")
        for cells in reader:
            if cells and len(cells) != len(columns):
                raise InputError(
                    f"{path}, line {reader.line_num}: expected {len(columns)} cells, one for each "
                    f"column, got {len(cells)}"
                )
            if cells:
                yield dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: expected CSV, got: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, the byte order mark of some programs left out."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: expected UTF-8 text, got the byte "
                    f"{line[error.start]:#04x} at place {error.start + 1}; convert the file first"
                ) from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _survey(rows: Iterable[dict]) -> tuple[list[str], int]:
    """All keys in the order of their first row, and the number of rows."""
    columns: dict[str, None] = {}
    count = 0
    for row in rows:
        count += 1
        if not row.keys() <= columns.keys():
            columns |= dict.fromkeys(row)
    return list(columns), count


# --- tables --------------------------------------------------------------------------------------


def table(data: Any, name: str) -> Rows:  # a datasets.Dataset, or an IterableDataset
    """Rows of a table, without the None that fills the keys which only other rows have."""
    schema = []
    if data.features is not None:
        data = data.with_format(None)  # a copy
        data.info.features = _encoded(data.features)
        schema = data.features.arrow_schema
    nested = {f.name: strip for f in schema if (strip := _strip(f.type)) is not None}
    if not hasattr(data, "__len__"):  # a stream is read once
        data = list(data)

    def read() -> Iterator[dict]:
        try:
            for row in data:
                for column, strip in nested.items():
                    row[column] = strip(row[column])
                yield row
        # of a file that claims to hold text, found only where it is read
        except UnicodeDecodeError as error:
            raise InputError(f"cannot read {name}: expected UTF-8 text, {error}") from error

    return Rows(read, getattr(data, "column_names", None), len(data), name)


def _strip(type: Any) -> Callable[[Any], Any] | None:
    """Return what takes off the None that a table of this Arrow type fills; None if none.

    The type says so: JSON that a cell holds keeps its own null.
    """
    from pyarrow import types

    if types.is_struct(type):
        inner = {field.name: _strip(field.type) or _as_it_is for field in type}
        return lambda value: (
            value and {k: inner[k](item) for k, item in value.items() if item is not None}
        )
    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        if (strip := _strip(type.value_type)) is not None:
            return lambda value: value and [strip(item) for item in value]
    return None


def _as_it_is(value: Any) -> Any:
    return value


def _encoded(feature: Any) -> Any:
    """The same without decoding of pictures and sounds: nothing here looks at them."""
    if isinstance(feature, dict):
        return type(feature)({name: _encoded(inner) for name, inner in feature.items()})
    if hasattr(feature, "feature"):
        return replace(feature, feature=_encoded(feature.feature))
    if hasattr(feature, "decode") and type(feature).__name__ != "Json":
        return replace(feature, decode=False)
    return feature
