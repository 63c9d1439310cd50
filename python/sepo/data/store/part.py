"""One part of a scored store: a parquet file, as flat arrays in memory, and its hidden rows."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.data.hidden import HiddenRows, open_rows
from sepo.data.types import ScoredPair
from sepo.errors import InputError
from sepo.system.checksums import check_about, crc32_of_json, damaged, parse_about

TOKENS = ("prompt", "chosen", "rejected")
WEIGHTS = ("chosen_weight", "rejected_weight")
FLOATS = {  # column -> the tokens it runs along; null where a store or a pair has none
    "chosen_score": "chosen",
    "rejected_score": "rejected",
    "chosen_ref_logp": "chosen",
    "rejected_ref_logp": "rejected",
    "chosen_weight": "chosen",
    "rejected_weight": "rejected",
}
SCHEMA = pa.schema(
    [("id", pa.string())]
    + [(name, pa.list_(pa.int32())) for name in TOKENS]
    + [(name, pa.list_(pa.float32())) for name in FLOATS]
)


def write_part(file: Path, pairs: list[ScoredPair], about: dict) -> None:
    """Write the columns; `about` is what `read_about` shall find, beside a checksum of all."""
    columns = {"id": pa.array([p.id for p in pairs], pa.string())}
    for field in SCHEMA:
        if field.name != "id":
            columns[field.name] = pa.array([getattr(p, field.name) for p in pairs], field.type)
    table = pa.table(columns, schema=SCHEMA)
    about = about | {"check": _check_of(*_flat(table), about)}
    table = table.replace_schema_metadata({"sepo": json.dumps(about, sort_keys=True)})
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_about(file: Path) -> dict:
    """Read what a part says of itself; its checksum is not compared."""
    return _about(file, _read(file, pq.read_schema))


def hidden_name(part_name: str) -> str:
    """The file of a part's hidden rows, beside it."""
    return part_name.replace(".parquet", ".safetensors")


class Part:
    """One parquet file as flat arrays: values, offsets and, for nullable columns, which are set.

    Raises InputError for a file that is not whole, or not the one that `expected` tells of: "run",
    "part" and "pairs", from and up to. Rows of a reference are looked at if `hidden_width` is given.
    """

    def __init__(self, file: Path, expected: dict, hidden_width: int | None = None):
        table = _read(file, _read_table)
        self.about = _about(file, table.schema)
        check_about(file, self.about, expected)
        if not table.schema.equals(SCHEMA):
            raise InputError(f"{file}: expected columns {SCHEMA.names}, found {table.schema.names}")
        self.ids, self.columns = _read(file, lambda _: _flat(table))
        self.check = self.about.pop("check", None)  # None: an older version wrote none
        if self.check is not None and self.check != _check_of(self.ids, self.columns, self.about):
            raise damaged(file)
        self.lengths = np.stack([np.diff(self.columns[name][1]) for name in TOKENS], axis=1)
        self._check_values(file)
        if self.about.get("tokens") != (tokens := int(self.lengths.sum())):
            found = self.about.get("tokens")
            raise InputError(f"{file}: expected {found} tokens, as it says, found {tokens}")
        start, stop = expected["pairs"]
        if len(self.ids) != stop - start:
            raise InputError(f"{file}: expected {stop - start} pairs, found {len(self.ids)}")
        self.hidden = None
        if hidden_width is not None:
            path, lengths = file.with_name(hidden_name(file.name)), self.lengths[:, 1:].reshape(-1)
            self.hidden, self._row_checks = open_rows(path, expected, lengths, hidden_width)
            self._row_ends = np.cumsum(lengths)  # chosen before rejected

    @property
    def is_checked(self) -> bool:
        """Whether every value has a checksum."""
        return self.check is not None and (self.hidden is None or None not in self._row_checks)

    @property
    def row_checks(self) -> list[int | None]:
        """Of the hidden rows of every response; None for those of an older version."""
        return [] if self.hidden is None else self._row_checks

    def pair(self, row: int) -> ScoredPair:
        fields: dict[str, Any] = dict.fromkeys(self.columns)
        for name, (values, offsets, there) in self.columns.items():
            if there[row]:
                fields[name] = values[offsets[row] : offsets[row + 1]].copy()
        return ScoredPair(id=self.ids[row], **(fields | self._hidden_rows(row)))

    def check_rows(self) -> None:
        """Read all hidden rows. Raises InputError for those that are not as they were written."""
        for row in range(len(self.ids)):
            for rows in self._hidden_rows(row).values():
                rows.whole()

    def _hidden_rows(self, row: int) -> dict[str, HiddenRows]:
        """Where a pair's hidden rows lie, by the pair's field; empty where none are kept."""
        if self.hidden is None:
            return {}
        found = {}
        for side in (0, 1):
            response, count = 2 * row + side, int(self.lengths[row, 1 + side])
            start = int(self._row_ends[response]) - count
            rows = HiddenRows(self.hidden, start, count, self._row_checks[response])
            found[f"{TOKENS[1 + side]}_ref_hidden"] = rows
        return found

    def _check_values(self, file: Path) -> None:
        if (self.lengths < 1).any():
            row, column = np.argwhere(self.lengths < 1)[0]
            raise InputError(f"{file}: pair {self.ids[row]}: {TOKENS[column]} is empty")
        for name in TOKENS if self.check is None else ():
            values, offsets, _ = self.columns[name]
            if (bad := np.flatnonzero(values < 0)).size:
                row = np.searchsorted(offsets, bad[0], side="right") - 1
                raise InputError(
                    f"{file}: pair {self.ids[row]}: expected token ids in {name}, found "
                    f"{values[bad[0]]}"
                )
        for name, along in FLOATS.items():
            values, offsets, there = self.columns[name]
            found, expected = np.diff(offsets), self.lengths[:, TOKENS.index(along)]
            if wrong := np.flatnonzero(there & (found != expected)).tolist():
                raise InputError(
                    f"{file}: pair {self.ids[wrong[0]]}: expected {expected[wrong[0]]} values in "
                    f"{name}, one per {along} token, found {found[wrong[0]]}"
                )
            if not (is_finite := np.isfinite(values)).all():
                bad = np.flatnonzero(~is_finite)
                row = np.searchsorted(offsets, bad[0], side="right") - 1
                raise InputError(
                    f"{file}: pair {self.ids[row]}: expected finite values in {name}, found "
                    f"{values[bad[0]]} at position {bad[0] - offsets[row]}"
                )


def _read_table(file: Path) -> pa.Table:
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        return opened.read()


def _flat(table: pa.Table) -> tuple[list[str], dict[str, tuple]]:
    """Ids, and of each other column the values, where lists begin in them, and which are set."""
    columns = {}
    for name in SCHEMA.names[1:]:
        lists = pa.concat_arrays(table[name].chunks)  # offsets start at 0 after it
        values = lists.values.to_numpy(zero_copy_only=False)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        columns[name] = values, offsets, lists.is_valid().to_numpy(zero_copy_only=False)
    return table["id"].to_pylist(), columns


def _check_of(ids: list[str], columns: dict[str, tuple], about: dict) -> int:
    """CRC-32 of everything that is read of a part."""
    check = crc32_of_json([about, ids])
    for arrays in columns.values():
        for array in arrays:
            check = zlib.crc32(np.ascontiguousarray(array).data, check)
    return check


def _about(file: Path, schema: pa.Schema) -> dict:
    return parse_about(file, (schema.metadata or {}).get(b"sepo", b"{}"))


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        if not file.is_file():  # a pipe would be waited for, for ever
            raise FileNotFoundError("it is not there, or no file")
        return read(file)
    # a torn file brings up whatever it leads the reader to
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{file}: cannot be read ({reason}); delete it and score again") from error
