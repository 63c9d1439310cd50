"""Rows from a local file, a saved directory, the hub, or memory."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from sepo.data.read.cells import kind
from sepo.data.read.rows import Rows, csv_file, in_memory, joined, json_file, table
from sepo.errors import InputError


def load_rows(
    source: Any,  # a file, a directory of datasets.save_to_disk or of files, a hub id, or rows
    *,
    split: str | None = None,  # None: train
    config: str | None = None,
    limit: int | None = None,
    skip: int = 0,
) -> Rows:
    """The rows [skip, skip + limit) of one split.

    Something that looks like a path is never looked up on the hub. Rows are a Dataset, DatasetDict
    or IterableDataset of the datasets library, or dicts in a list or a map-style dataset of torch.
    Raises InputError, naming the source, if it is not there, cannot be read, has no such split or
    no rows.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise InputError(f"expected skip >= 0 and limit >= 1, got {skip} and {limit}")
    name = source_name(source)
    if isinstance(source, str | Path):
        rows = _load(source, split or "train", config)
    else:
        rows = _given(source, split or "train", None if limit is None else skip + limit)
    if len(rows) == 0:
        raise InputError(f"expected rows in {name}, got none")
    if skip >= len(rows):
        raise InputError(f"expected skip to leave rows of the {len(rows)} in {name}, got {skip}")
    stop = len(rows) if limit is None else min(len(rows), skip + limit)
    return rows.select(range(skip, stop))


def source_name(source: Any) -> str:
    """How a message calls it."""
    return str(source) if isinstance(source, str | Path) else "the data set"


def is_rows(data: Any) -> bool:
    """Whether this is rows that `load_rows` reads, and not pairs that are tokenised already."""
    if _made_by_datasets(data, "Dataset", "IterableDataset"):
        return True
    try:
        first = data[0]
    except (TypeError, KeyError, IndexError):
        return False
    return isinstance(first, Mapping)


def default_split(source: str | Path, usual: str) -> str:
    """The split that is meant where none is named: a file is all one."""
    return "train" if os.path.isfile(os.path.expanduser(source)) else usual


# --- what is in memory ---------------------------------------------------------------------------


def _given(source: Any, split: str, stop: int | None) -> Rows:
    if _made_by_datasets(source, "DatasetDict", "IterableDatasetDict"):
        source = _pick(source, split, "the data set")
    if _made_by_datasets(source, "IterableDataset") and stop is not None:
        source = source.take(stop)
    if _made_by_datasets(source, "Dataset", "IterableDataset"):
        return table(source, "the data set")
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        if not isinstance(source, Mapping) and not hasattr(source, "columns"):
            return in_memory(source[i] for i in range(len(source)))
    elif isinstance(source, Iterable):
        return in_memory(source)
    raise InputError(
        f"expected rows as a Dataset of the datasets library or a list of dicts, got {kind(source)}"
    )


def _made_by_datasets(data: Any, *kinds: str) -> bool:
    """Whether it is of these classes of the datasets library, which made nothing unless imported."""
    library = sys.modules.get("datasets")
    return isinstance(data, tuple(getattr(library, kind, ()) for kind in kinds))


def _pick(splits: Mapping, split: str, name: str) -> Any:
    if split not in splits:
        raise InputError(f"expected a split out of {', '.join(splits)} in {name}, got {split}")
    return splits[split]


# --- what is on the disk or on the hub -----------------------------------------------------------


def _load(source: str | Path, split: str, config: str | None) -> Rows:
    # not pathlib's own of each, which raise for a name that is too long or whose ~user is nobody
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return _load_file(path, split)
    if any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path, split)
    if os.path.isfile(path / "manifest.json"):
        raise InputError(f"expected rows of text or token ids, got a scored store: {source}")
    if os.path.isdir(path):
        # a relative path may be the name of a reader (json), which takes all there is in this folder
        return _load_dataset(str(path.resolve()), config, split, source)
    if _looks_like_path(str(source)):
        raise InputError(f"no such file or directory: {source}")
    return _load_dataset(str(source), config, split, source)


def _looks_like_path(source: str) -> bool:
    """Everything but `name` and `owner/name`, the two forms of a hub id."""
    if Path(source).suffix in READERS or source.endswith("/"):
        return True
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is None


def _load_file(path: Path, split: str) -> Rows:
    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise InputError(f"expected a file with a suffix out of {known}, got {path}")
    if path.stat().st_size == 0:
        raise InputError(f"expected rows in {path}, got an empty file")
    return _of_split({"train": [path]}, split, READERS[path.suffix], path)


def _table_file(path: Path, kind_of_file: str = "parquet") -> Rows:
    """A file by itself: beside others its columns would have to be theirs."""
    files = dict(data_files=str(path), split="train")
    return table(_call(path, "load_dataset", kind_of_file, quiet=True, **files), str(path))


def _load_saved(path: Path, split: str) -> Rows:
    saved = _call(path, "load_from_disk", str(path))
    if _made_by_datasets(saved, "DatasetDict"):
        saved = _pick(saved, split, str(path))
    return table(saved, str(path))


def _load_dataset(name: str, config: str | None, split: str, source: str | Path) -> Rows:
    """A directory of files or a data set of the hub, whichever files the datasets library finds."""
    _datasets(source)
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if name in readers:
        raise InputError(
            f"expected a file, a directory or a hub id, got {name}: the name of a kind of file"
        )
    builder = _call(source, "load_dataset_builder", name, config)
    options = builder.config
    if isinstance(builder, Json) and options.field is None:
        read = json_file
    elif isinstance(builder, Parquet) and options.filters is None and options.columns is None:
        read = _table_file
    elif isinstance(builder, Arrow):
        read = partial(_table_file, kind_of_file="arrow")
    elif isinstance(builder, Csv):
        read = lambda path: csv_file(path, options.delimiter or options.sep)
    else:
        return table(_call(source, "load_dataset", name, config, split=split), str(source))
    return _of_split(_fetched(builder, source), split, read, source)


READERS = {".json": json_file, ".jsonl": json_file, ".csv": csv_file, ".parquet": _table_file}


def _fetched(builder: Any, source: str | Path) -> dict[str, list[Path]]:
    """Split -> its files on this disk."""
    datasets = _datasets(source)

    def fetch(files: Iterable[str]) -> list[Path]:
        manager = datasets.DownloadManager()
        return [
            Path(file) for file in manager.iter_files(manager.download_and_extract(list(files)))
        ]

    found = builder.config.data_files
    return {str(name): _call(source, fetch, found[name]) for name in found}


def _of_split(
    files: Mapping[str, list[Path]], split: str, read: Callable[[Path], Rows], source: str | Path
) -> Rows:
    """The rows of a split, or of what the datasets library calls one: train[:100], train+test."""
    if split in files:
        return joined([read(path) for path in files[split]])
    datasets = _datasets(f"{source}, split {split},")

    splits = {name: joined([read(path) for path in paths]) for name, paths in files.items()}
    sizes = {name: len(rows) for name, rows in splits.items()}
    spec = "+".join(files) if split == "all" else split
    parts = _call(source, lambda: datasets.ReadInstruction.from_spec(spec).to_absolute(sizes))
    return joined([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _call(
    source: str | Path, function: Callable | str, *args: Any, quiet: bool = False, **options: Any
) -> Any:
    """Call a reader, the datasets library's or another; its errors become one line."""
    datasets = _datasets(source)
    # a bar is for a download, not for a file that is there already
    quiet = quiet and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it also raises
    try:
        call = getattr(datasets, function) if isinstance(function, str) else function
        return call(*args, **options)
    except InputError:
        raise
    # datasets raises its own, arrow's, pandas' and the network's errors, all of them about the source
    except Exception as error:
        cause = error.__cause__ or error  # says more than its wrapper
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = lines[0] if lines else "without a reason"
        raise InputError(f"cannot read {source}: {type(cause).__name__}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if quiet:
            datasets.enable_progress_bars()


def _datasets(what: str | Path) -> ModuleType:
    """The library, where something is read that nothing else reads."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{what} is read by the datasets library: pip install datasets ({error})"
        ) from error
    return datasets
