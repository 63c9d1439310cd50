"""Rows from a local file, a saved directory or the hub, all by way of the datasets library."""

import csv
import re
from pathlib import Path
from typing import Any

from sepo.errors import InputError

# suffix -> the reader of datasets
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    source: Any,  # a file, a directory of datasets.save_to_disk or of files, a hub id, a Dataset
    *,
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    skip: int = 0,
) -> Any:  # datasets.Dataset
    """The rows [skip, skip + limit) of one split.

    Something that looks like a path is never looked up on the hub. Raises InputError, naming the
    source, if it is not there, cannot be read, has no such split or no rows.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise InputError(f"expected skip >= 0 and limit >= 1, got {skip} and {limit}")
    rows = _load(source, split, config) if isinstance(source, str | Path) else source
    if len(rows) == 0:
        raise InputError(f"expected rows in {source}, got none")
    if skip >= len(rows):
        raise InputError(f"expected skip to leave rows of the {len(rows)} in {source}, got {skip}")
    stop = len(rows) if limit is None else min(len(rows), skip + limit)
    return rows.select(range(skip, stop))


def _load(source: str | Path, split: str, config: str | None) -> Any:
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path, split)
    if (path / "manifest.json").is_file():
        raise InputError(f"expected rows of text or token ids, got a scored store: {source}")
    if path.is_dir():
        return _load_dataset(str(path), config, source=source, split=split)
    if _looks_like_path(str(source)):
        raise InputError(f"no such file or directory: {source}")
    return _load_dataset(str(source), config, source=source, split=split)


def _looks_like_path(source: str) -> bool:
    """Everything but `name` and `owner/name`, the two forms of a hub id."""
    if Path(source).suffix in READERS or source.endswith("/"):
        return True
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is None


def _load_file(path: Path, split: str) -> Any:
    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise InputError(f"expected a file with a suffix out of {known}, got {path}")
    if path.stat().st_size == 0:
        raise InputError(f"expected rows in {path}, got an empty file")
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        options = _all_strings(path)
    return _load_dataset(
        READERS[path.suffix], None, source=path, split=split, data_files=str(path), **options
    )


def _all_strings(path: Path) -> dict[str, Any]:
    """Keep a CSV's cells as they are: an answer "42" or "None" is a text, not a number or null."""
    from datasets import Features, Value

    with path.open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file), [])
    return {"features": Features({c: Value("string") for c in columns}), "na_filter": False}


def _load_saved(path: Path, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise InputError(f"expected a split out of {', '.join(saved)} in {path}, got {split}")
    return saved[split]


def _load_dataset(name: str, config: str | None, *, source: str | Path, **options: Any) -> Any:
    import datasets

    # a bar is for a download, not for a file that is there already
    is_quiet = "data_files" in options and not datasets.are_progress_bars_disabled()
    if is_quiet:
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, **options)
    # datasets raises its own, arrow's, pandas' and the network's errors, all of them about the
    # source; the cause says more than the wrapper
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0]
        raise InputError(f"cannot read {source}: {type(cause).__name__}: {reason}") from error
    finally:
        if is_quiet:
            datasets.enable_progress_bars()
