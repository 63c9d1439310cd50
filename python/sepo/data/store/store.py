"""The scored store: a directory of parquet parts and one manifest.

    manifest.json                  what was scored, by which models, and into how many parts
    part-00000-of-00042.parquet    pairs 0 to pairs_per_part - 1, in the order of the data
    *.safetensors                  the reference's hidden rows and head, if kept: see hidden.py

Parts are consecutive blocks of the data, so their content does not depend on who wrote them: any
number of processes fill one store. A file appears whole or not at all. Whether the store is
complete follows from the parts that are there, never from what a manifest says about itself.

Every file has a checksum of what is read of it, and says which part it is. Opening a store compares
those of the manifest and the parts; hidden rows and the head, which are read later or never, are
compared when they are read. Stores of versions without checksums are read with a note.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import index as as_index
from pathlib import Path
from typing import Any, overload

import numpy as np

from sepo.data.hidden import HEAD_FILE, HiddenRows, StoredHead, read_head, write_head, write_rows
from sepo.data.read.tokenise import text_prefix
from sepo.data.store.manifest import (
    FORMAT,
    IDENTITY,
    MANIFEST,
    about_part,
    check_entries,
    check_same_run,
    hash_json,
    num_parts,
    pairs_of,
    part_name,
    read_manifest,
    run_of,
    sealed,
)
from sepo.data.store.part import TOKENS, WEIGHTS, Part, hidden_name, read_about, write_part
from sepo.data.types import ScoredPair, TokenPair
from sepo.errors import InputError
from sepo.system.checksums import check_about
from sepo.system.files import Atomic, clear

__all__ = [
    "FORMAT",
    "IDENTITY",
    "MANIFEST",
    "ScoredStore",
    "StoreWriter",
    "is_store",
    "num_parts",
    "pairs_hash",
    "read_manifest",
    "template_hash",
    "tokenizer_hash",
    "verify_store",
]
PART = re.compile(r"part-\d{5,15}-of-\d{5,}\.parquet")
SHOWN = 8  # missing parts that a message names


class ScoredStore(Sequence[ScoredPair]):
    """A complete store, decoded in memory: about 8 bytes a token. Hidden rows stay on the disk.

    A sequence of its pairs in the order of the data: length, indices from either end, slices
    (lists of pairs), iteration, `in`.
    """

    def __init__(self, path: Path, manifest: dict, parts: list[Part]):
        self.path, self.manifest = path, manifest
        self.lengths = np.concatenate([p.lengths for p in parts])  # (pairs, 3) int64: TOKENS
        self._parts = parts

    @classmethod
    def open(cls, path: str | os.PathLike, tokenizer: Any = None) -> "ScoredStore":
        """Read and check a store.

        Raises InputError for a directory that is no store, another format version, a manifest whose
        entries can't be, missing parts, a part that is damaged, of another run or of another place,
        a tokenizer that is not the store's (if one is given), a value that is NaN or infinite,
        lists whose lengths disagree, and hidden rows or a head that are torn, of another shape or
        of another run. Values of hidden rows and head are compared when they are read.
        """
        path = Path(path)
        manifest = _manifest_at(path)
        if tokenizer is not None:
            _check_tokenizer(path, manifest, tokenizer)
        _check_complete(path, manifest)
        parts = [_part(path, manifest, index) for index in range(num_parts(manifest))]
        store = cls(path, _completed(manifest, [part.about for part in parts]), parts)
        if manifest.get("hidden_width") is not None:
            store._head(contents=False)
        if unchecked := store.unchecked:
            logging.getLogger(__name__).warning(
                f"{path}: {unchecked} of {len(parts)} parts have no checksums, which older versions "
                "didn't write: damage to their values can't be seen"
            )
        return store

    @property
    def unchecked(self) -> int:
        """Parts whose values have no checksums."""
        return sum(not part.is_checked for part in self._parts)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> ScoredPair: ...

    @overload
    def __getitem__(self, index: slice) -> list[ScoredPair]: ...

    def __getitem__(self, index: int | slice) -> ScoredPair | list[ScoredPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not -len(self) <= (index := as_index(index)) < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        part, row = divmod(index % len(self), self.manifest["pairs_per_part"])
        return self._parts[part].pair(row)

    def __iter__(self) -> Iterator[ScoredPair]:
        # Sequence's own would take an IndexError of decoding for the end
        return (self[i] for i in range(len(self)))

    def pairs(self) -> Iterator[ScoredPair]:
        """All pairs in the order of the data."""
        return iter(self)

    def reference_head(self) -> StoredHead:
        """Return the head that turns hidden rows into logits; only a store that keeps rows has it.

        Raises InputError for one that is not as it was written.
        """
        return self._head(contents=True)

    def hidden_hash(self) -> str | None:
        """16 hex digits for all hidden rows, by their checksums; None if some have none."""
        checks = [check for part in self._parts for check in part.row_checks]
        return hash_json(checks)[:16] if checks and None not in checks else None

    def _head(self, contents: bool) -> StoredHead:
        manifest = self.manifest
        width, file = manifest["hidden_width"], self.path / HEAD_FILE
        return read_head(file, run_of(manifest), width, contents=contents)


class StoreWriter:
    """Fills a store part by part; several may work on one directory, each with its own owner name.

    `manifest` holds at least the entries of IDENTITY. Who may not be alone holds
    `sepo.system.lock.lock(path, owner)` meanwhile: then what killed owners left is known from what others
    write. Raises InputError where the directory already holds a store that differs in one of them.
    """

    def __init__(self, path: str | os.PathLike, manifest: dict, *, owner: str = "0"):
        self.path, self.owner = Path(path), owner
        check_entries(self.path / MANIFEST, manifest)
        clear(self.path, owner)
        present = read_manifest(self.path)
        if present is not None:
            check_same_run(self.path, present, manifest)
        elif stray := next(self.path.glob("part-*"), None):
            raise InputError(f"{self.path}: found {stray.name} without {MANIFEST}")
        self.manifest = present or manifest | {"complete": False}

    def missing(self) -> list[int]:
        """Indices of the parts that are still to be written.

        Raises InputError for a part of another run or another place.
        """
        there = _parts_there(self.path, self.manifest)
        for part in there:
            self._about(part)
        return [part for part in range(num_parts(self.manifest)) if part not in there]

    def pairs_of(self, part: int) -> range:
        """Indices of the pairs that belong to a part."""
        return pairs_of(self.manifest, part)

    def begin(self) -> None:
        """Put the manifest there, so that a directory with parts always says whose they are."""
        if (self.path / MANIFEST).is_file():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: expected a folder, got {error.strerror}") from error
        # Two owners may both get here; they replace one file by another like it.
        self._write_json(self.manifest)
        check_same_run(self.path, _manifest_at(self.path), self.manifest)

    def write(self, part: int, pairs: list[ScoredPair], *, note: dict | None = None) -> None:
        """Write one part, atomically. `note`: what the manifest shall say about its making.

        A store that keeps hidden rows needs its head first, and pairs that carry theirs.
        """
        self.begin()
        name, about = part_name(self.manifest, part), about_part(self.manifest, part)
        if self.manifest.get("hidden_width") is not None:
            rows = _hidden_rows(pairs)
            # before the part that declares it: killed in between, the part is written again
            with Atomic(self.path / hidden_name(name), self.owner) as temporary:
                write_rows(temporary, rows, about)
        with Atomic(self.path / name, self.owner) as temporary:
            write_part(temporary, pairs, about | {"tokens": sum(map(len, pairs))} | (note or {}))

    def write_head(self, head: StoredHead) -> None:
        """Write the reference's head, if it is not there."""
        self.begin()
        if not (self.path / HEAD_FILE).is_file():
            with Atomic(self.path / HEAD_FILE, self.owner) as temporary:
                write_head(temporary, head, run_of(self.manifest))

    def finish(self) -> bool:
        """Complete the manifest if every part is there; whoever comes last does it. Idempotent."""
        total = num_parts(self.manifest)
        if len(_parts_there(self.path, self.manifest)) < total:
            return False
        abouts = [self._about(part) for part in range(total)]
        self.manifest = _completed(self.manifest, abouts)
        self._write_json(self.manifest)
        return True

    def _write_json(self, value: dict) -> None:
        with Atomic(self.path / MANIFEST, self.owner) as temporary:
            temporary.write_text(json.dumps(sealed(value), indent=1, sort_keys=True) + "\n")

    def _about(self, part: int) -> dict:
        file = self.path / part_name(self.manifest, part)
        about = read_about(file)
        check_about(file, about, about_part(self.manifest, part))
        return about


def is_store(path: str | os.PathLike) -> bool:
    """Whether a data set's name is the directory of a scored store, complete or not."""
    return os.path.isfile(Path(path) / MANIFEST)  # False for a path that can't be one, too


def verify_store(path: str | os.PathLike) -> ScoredStore:
    """Read everything of a store and compare it with its checksums, and the pairs with the data's.

    Raises InputError as `ScoredStore.open` does, but looks at all files first and names each that
    is not whole.
    """
    path = Path(path)
    manifest = _manifest_at(path)
    _check_complete(path, manifest)
    problems = []
    for index in range(num_parts(manifest)):
        try:
            _part(path, manifest, index).check_rows()
        except InputError as error:
            problems.append(str(error))
    if manifest.get("hidden_width") is not None:
        try:
            read_head(path / HEAD_FILE, run_of(manifest), manifest["hidden_width"])
        except InputError as error:
            problems.append(str(error))
    if problems:
        count = f"{len(problems)} files are not whole: " if len(problems) > 1 else ""
        raise InputError(count + "; ".join(problems))
    store = ScoredStore.open(path)
    if (found := pairs_hash(store.pairs())) != manifest["source"]:
        raise InputError(
            f"{path}: expected the pairs that were scored ({manifest['source'][:12]}), "
            f"found others ({found[:12]})"
        )
    return store


def tokenizer_hash(tokenizer: Any, *, like: str | None = None) -> str:
    """SHA-256 of what turns text into ids and what the ids mean.

    Vocabulary, merges, normaliser, pre-tokeniser, added tokens, the bos, eos and unk tokens and
    what post-processing puts before a text count. Truncation and padding state, the padding token
    and the rest of post-processing do not: none of them changes the tokens of a pair, and training
    scripts set them freely. A hash of an older version, which knew nothing of post-processing, is
    returned if it is `like` and this tokenizer's.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {k: state[k] for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {k: getattr(tokenizer, k, None) for k in ("bos_token", "eos_token", "unk_token")}
    known = [content, {k: v and str(v) for k, v in special.items()}]
    if like is not None and like == hash_json(known):
        return like
    return hash_json([*known, text_prefix(tokenizer)])


def template_hash(tokenizer: Any) -> str:
    """SHA-256 of the chat template, "none" without one."""
    template = getattr(tokenizer, "chat_template", None)
    return "none" if template is None else hash_json(template)


def pairs_hash(pairs: Iterable[TokenPair]) -> str:
    """SHA-256 of all ids, tokens and weights, in order."""
    digest = hashlib.sha256()
    dtypes = dict.fromkeys(TOKENS, np.int32) | dict.fromkeys(WEIGHTS, np.float32)
    for pair in pairs:
        digest.update(f"{pair.id}\0".encode())
        for name, dtype in dtypes.items():
            values = getattr(pair, name)
            # the length too, or tokens could move from one list to the next unseen
            digest.update(b"-" if values is None else f"{len(values)}:".encode())
            if values is not None:
                digest.update(np.ascontiguousarray(values, dtype).data)
    return digest.hexdigest()


def _manifest_at(path: Path) -> dict:
    manifest = read_manifest(path)
    if manifest is None:
        raise InputError(f"{path}: expected a scored store, found no {MANIFEST}")
    return manifest


def _parts_there(path: Path, manifest: dict) -> set[int]:
    """Indices of the parts all of whose files are there.

    Asks for what is there, not for what should be: a manifest may speak of a thousand million.
    """
    files = {file.name for file in path.glob("part-*")}
    if manifest.get("hidden_width") is not None:
        files = {name for name in files if hidden_name(name) in files}
    found = {int(name[5:].split("-")[0]) for name in files if PART.fullmatch(name)}
    return {i for i in found if part_name(manifest, i) in files and pairs_of(manifest, i)}


def _check_complete(path: Path, manifest: dict) -> None:
    total, there = num_parts(manifest), _parts_there(path, manifest)
    if len(there) < total:
        first = list(islice((i for i in range(total) if i not in there), SHOWN + 1))
        shown = ", ".join(map(str, first[:SHOWN])) + (", ..." if len(first) > SHOWN else "")
        raise InputError(
            f"{path}: {total - len(there)} of {total} parts are missing ({shown}); "
            "run the same `sepo score` command again, for every shard: it writes only those"
        )


def _part(path: Path, manifest: dict, index: int) -> Part:
    file, width = path / part_name(manifest, index), manifest.get("hidden_width")
    return Part(file, about_part(manifest, index), width)


def _completed(manifest: dict, abouts: list[dict]) -> dict:
    """The manifest with what the parts say about their making: a function of the files alone."""
    checks = [a["precision_check"] for a in abouts if a.get("precision_check")]
    return manifest | {
        "complete": True,
        "tokens": sum(a["tokens"] for a in abouts),
        "devices": sorted({device for a in abouts for device in a.get("devices", [])}),
        "precision_check": checks[0] if checks else None,
    }


def _hidden_rows(pairs: list[ScoredPair]) -> list[HiddenRows]:
    rows = [r for p in pairs for r in (p.chosen_ref_hidden, p.rejected_ref_hidden)]
    kept = [r for r in rows if r is not None]
    if len(kept) < len(rows):
        raise ValueError(f"expected {len(rows)} responses with hidden rows, got {len(kept)}")
    return kept


def _check_tokenizer(path: Path, manifest: dict, tokenizer: Any) -> None:
    stored = manifest["tokenizer"]
    given = tokenizer_hash(tokenizer, like=stored)
    if given != stored:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"{path}: scored with tokenizer {manifest.get('tokenizer_name')} ({stored[:12]}), "
            f"got {name} ({given[:12]}); `sepo transfer` carries scores to another tokenizer"
        )
