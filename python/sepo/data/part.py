"""One part of a scored store: a parquet file, as flat arrays in memory, and its hidden rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.data.hidden import HiddenFile, HiddenRows, check_rows
from sepo.data.types import ScoredPair
from sepo.errors import InputError

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
    """Write the columns; `about` is what `read_about` shall find."""
    columns = {"id": pa.array([p.id for p in pairs], pa.string())}
    for field in SCHEMA:
        if field.name != "id":
            columns[field.name] = pa.array([getattr(p, field.name) for p in pairs], field.type)
    schema = SCHEMA.with_metadata({"sepo": json.dumps(about, sort_keys=True)})
    pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")


def read_about(file: Path) -> dict:
    return json.loads((_read(file, pq.read_schema).metadata or {}).get(b"sepo", b"{}"))


def hidden_name(part_name: str) -> str:
    """The file of a part's hidden rows, beside it."""
    return part_name.replace(".parquet", ".safetensors")


class Part:
    """One parquet file as flat arrays: values, offsets and, for nullable columns, which are set."""

    def __init__(self, file: Path, hidden_width: int | None = None, run: str = ""):
        table = _read(file, lambda f: pq.read_table(f, partitioning=None))
        if not table.schema.equals(SCHEMA):
            raise InputError(f"{file}: expected columns {SCHEMA.names}, found {table.schema.names}")
        self.ids = table["id"].to_pylist()
        self.columns = {}
        for name in SCHEMA.names[1:]:
            lists = pa.concat_arrays(table[name].chunks)  # offsets start at 0 after it
            values = lists.values.to_numpy(zero_copy_only=False)
            offsets = lists.offsets.to_numpy().astype(np.int64)
            self.columns[name] = values, offsets, lists.is_valid().to_numpy(zero_copy_only=False)
        self.lengths = np.stack([np.diff(self.columns[name][1]) for name in TOKENS], axis=1)
        self._check(file)
        self.hidden = None
        if hidden_width is not None:
            path = file.with_name(hidden_name(file.name))
            ends = np.cumsum(self.lengths[:, 1:])  # chosen before rejected
            check_rows(path, run, (int(ends[-1]), hidden_width))
            self.hidden, self._ends = HiddenFile(path), ends.reshape(-1, 2)

    def pair(self, row: int) -> ScoredPair:
        fields = dict.fromkeys(self.columns)
        for name, (values, offsets, there) in self.columns.items():
            if there[row]:
                fields[name] = values[offsets[row] : offsets[row + 1]].copy()
        if self.hidden is not None:
            for side in (0, 1):
                count = int(self.lengths[row, 1 + side])
                rows = HiddenRows(self.hidden, int(self._ends[row, side]) - count, count)
                fields[f"{TOKENS[1 + side]}_ref_hidden"] = rows
        return ScoredPair(id=self.ids[row], **fields)

    def _check(self, file: Path) -> None:
        if (self.lengths < 1).any():
            row, column = np.argwhere(self.lengths < 1)[0]
            raise InputError(f"{file}: row {self.ids[row]}: {TOKENS[column]} is empty")
        for name, along in FLOATS.items():
            values, offsets, there = self.columns[name]
            found, expected = np.diff(offsets), self.lengths[:, TOKENS.index(along)]
            if wrong := np.flatnonzero(there & (found != expected)).tolist():
                raise InputError(
                    f"{file}: row {self.ids[wrong[0]]}: expected {expected[wrong[0]]} values in "
                    f"{name}, one per {along} token, found {found[wrong[0]]}"
                )
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                row = np.searchsorted(offsets, bad[0], side="right") - 1
                raise InputError(
                    f"{file}: row {self.ids[row]}: expected finite values in {name}, found "
                    f"{values[bad[0]]} at position {bad[0] - offsets[row]}"
                )


def _read(file: Path, read):
    try:
        return read(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{file}: cannot be read ({error}); delete it and score again") from error
