"""The scored store: a directory of parquet parts and one manifest.

    manifest.json                  what was scored, by which models, and into how many parts
    part-00000-of-00042.parquet    pairs 0 to pairs_per_part - 1, in the order of the data
    *.safetensors                  the reference's hidden rows and head, if kept: see hidden.py

Parts are consecutive blocks of the data, so their content does not depend on who wrote them: any
number of processes fill one store. A file appears whole or not at all. Whether the store is
complete follows from the parts that are there, never from what a manifest says about itself.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sepo.data.files import Atomic, clear
from sepo.data.hidden import HEAD_FILE, StoredHead, read_head, write_head, write_rows
from sepo.data.part import TOKENS, WEIGHTS, Part, hidden_name, read_about, write_part
from sepo.data.tokenise import text_prefix
from sepo.data.types import ScoredPair, TokenPair
from sepo.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
IDENTITY = {  # manifest entries that make two runs the same run -> how a message calls them
    "format": "format version",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "oracle": "oracle weights",
    "oracle_dtype": "oracle dtype",
    "reference": "reference weights",
    "reference_dtype": "reference dtype",
    "source": "data",
    "keep": "kept columns",
    "pairs": "number of pairs",
    "pairs_per_part": "pairs per part",
}


class ScoredStore:
    """A complete store, decoded in memory: about 8 bytes a token. Hidden rows stay on the disk."""

    def __init__(self, path: Path, manifest: dict, parts: list[Part]):
        self.path, self.manifest = path, manifest
        self.lengths = np.concatenate([p.lengths for p in parts])  # (pairs, 3) int64: TOKENS
        self._parts = parts

    @classmethod
    def open(cls, path: str | os.PathLike, tokenizer=None) -> "ScoredStore":
        """Read and check a store.

        Raises InputError for a directory that is no store, another format version, missing parts,
        a part of another run, a tokenizer that is not the store's (if one is given), a value that
        is NaN or infinite, lists whose lengths disagree, and hidden rows or a head that are torn,
        of another shape or of another run.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            raise InputError(f"{path}: expected a scored store, found no {MANIFEST}")
        if tokenizer is not None:
            _check_tokenizer(path, manifest, tokenizer)
        missing = missing_parts(path, manifest)
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise InputError(
                f"{path}: {len(missing)} of {num_parts(manifest)} parts are missing ({shown}); "
                "run the same `sepo score` command again, for every shard: it writes only those"
            )
        width, run = manifest.get("hidden_width"), _run(manifest)
        parts = [Part(path / name, width, run) for name in part_names(manifest)]
        if (found := sum(len(p.ids) for p in parts)) != manifest["pairs"]:
            raise InputError(f"{path}: expected {manifest['pairs']} pairs, found {found}")
        store = cls(path, _completed(path, manifest), parts)
        if width is not None:
            store.reference_head()
        return store

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> ScoredPair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        part, row = divmod(index % len(self), self.manifest["pairs_per_part"])
        return self._parts[part].pair(row)

    def pairs(self) -> Iterator[ScoredPair]:
        """All pairs in the order of the data."""
        return (self[i] for i in range(len(self)))

    def reference_head(self) -> StoredHead:
        """What turns the pairs' hidden rows into logits; only a store that keeps rows has it."""
        return read_head(self.path / HEAD_FILE, _run(self.manifest), self.manifest["hidden_width"])


class StoreWriter:
    """Fills a store part by part; several may work on one directory, each with its own owner name.

    `manifest` holds at least the entries of IDENTITY. Raises InputError where the directory already
    holds a store that differs in one of them.
    """

    def __init__(self, path: str | os.PathLike, manifest: dict, *, owner: str = "0"):
        self.path, self.owner = Path(path), owner
        clear(self.path, owner)
        present = read_manifest(self.path)
        if present is not None:
            _check_same_run(self.path, present, manifest)
        elif stray := next(self.path.glob("part-*"), None):
            raise InputError(f"{self.path}: found {stray.name} without {MANIFEST}")
        self.manifest = present or manifest | {"complete": False}

    def missing(self) -> list[int]:
        """Indices of the parts that are still to be written."""
        return missing_parts(self.path, self.manifest)

    def pairs_of(self, part: int) -> range:
        """Indices of the pairs that belong to a part."""
        size = self.manifest["pairs_per_part"]
        return range(part * size, min((part + 1) * size, self.manifest["pairs"]))

    def write(self, part: int, pairs: list[ScoredPair], *, note: dict | None = None) -> None:
        """Write one part, atomically. `note`: what the manifest shall say about its making.

        A store that keeps hidden rows needs its head first, and pairs that carry theirs.
        """
        self._begin()
        name, run = part_names(self.manifest)[part], _run(self.manifest)
        if self.manifest.get("hidden_width") is not None:
            rows = [r for p in pairs for r in (p.chosen_ref_hidden, p.rejected_ref_hidden)]
            # before the part that declares it: killed in between, the part is written again
            with Atomic(self.path / hidden_name(name), self.owner) as temporary:
                write_rows(temporary, rows, run)
        with Atomic(self.path / name, self.owner) as temporary:
            about = {"run": run, "tokens": sum(map(len, pairs)), **(note or {})}
            write_part(temporary, pairs, about)

    def write_head(self, head: StoredHead) -> None:
        """Write the reference's head, if it is not there."""
        self._begin()
        if not (self.path / HEAD_FILE).is_file():
            with Atomic(self.path / HEAD_FILE, self.owner) as temporary:
                write_head(temporary, head, _run(self.manifest))

    def finish(self) -> bool:
        """Complete the manifest if every part is there; whoever comes last does it. Idempotent."""
        if self.missing():
            return False
        self.manifest = _completed(self.path, self.manifest)
        self._write_json(self.manifest)
        return True

    def _begin(self) -> None:
        """Put the manifest there, so that a directory with parts always says whose they are."""
        if (self.path / MANIFEST).is_file():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # Two owners may both get here; they replace one file by another like it.
        self._write_json(self.manifest)
        _check_same_run(self.path, read_manifest(self.path), self.manifest)

    def _write_json(self, value: dict) -> None:
        with Atomic(self.path / MANIFEST, self.owner) as temporary:
            temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def is_store(path: str | os.PathLike) -> bool:
    """Whether a data set's name is the directory of a scored store, complete or not."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path) -> dict | None:
    """The manifest as written, None if there is none. Raises InputError for another format."""
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected the JSON manifest of a scored store") from error
    if found != FORMAT:
        raise InputError(f"{file}: expected format version {FORMAT}, found {found}")
    return manifest


def num_parts(manifest: dict) -> int:
    return -(-manifest["pairs"] // manifest["pairs_per_part"])


def part_names(manifest: dict) -> list[str]:
    total = num_parts(manifest)
    return [f"part-{i:05d}-of-{total:05d}.parquet" for i in range(total)]


def missing_parts(path: Path, manifest: dict) -> list[int]:
    """Indices of the parts not all there. Raises InputError for a part of another run."""
    missing, run, keeps_rows = [], _run(manifest), manifest.get("hidden_width") is not None
    for index, name in enumerate(part_names(manifest)):
        files = [path / name] + [path / hidden_name(name)] * keeps_rows
        if not all(file.is_file() for file in files):
            missing.append(index)
        elif read_about(path / name).get("run") != run:
            raise InputError(f"{path / name}: written by another run than {MANIFEST} describes")
    return missing


def tokenizer_hash(tokenizer, *, like: str | None = None) -> str:
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
    if like is not None and like == _hash_json(known):
        return like
    return _hash_json([*known, text_prefix(tokenizer)])


def template_hash(tokenizer) -> str:
    """SHA-256 of the chat template, "none" without one."""
    template = getattr(tokenizer, "chat_template", None)
    return "none" if template is None else _hash_json(template)


def pairs_hash(pairs: list[TokenPair]) -> str:
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


def _completed(path: Path, manifest: dict) -> dict:
    """The manifest with what the parts say about their making: a function of the files alone."""
    abouts = [read_about(path / name) for name in part_names(manifest)]
    checks = [a["precision_check"] for a in abouts if a.get("precision_check")]
    return manifest | {
        "complete": True,
        "tokens": sum(a["tokens"] for a in abouts),
        "devices": sorted({device for a in abouts for device in a.get("devices", [])}),
        "precision_check": checks[0] if checks else None,
    }


def _check_same_run(path: Path, present: dict, wanted: dict) -> None:
    for key, words in IDENTITY.items():
        if present.get(key) != wanted.get(key):
            found, got = (str(m.get(key))[:32] for m in (present, wanted))  # hashes are long
            raise InputError(
                f"{path}: holds a store with another {words} ({found}, this run: {got}); "
                "choose another directory, or delete this one"
            )


def _check_tokenizer(path: Path, manifest: dict, tokenizer) -> None:
    stored = manifest["tokenizer"]
    given = tokenizer_hash(tokenizer, like=stored)
    if given != stored:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"{path}: scored with tokenizer {manifest.get('tokenizer_name')} ({stored[:12]}), "
            f"got {name} ({given[:12]}); `sepo transfer` carries scores to another tokenizer"
        )


def _run(manifest: dict) -> str:
    return _hash_json([manifest.get(key) for key in IDENTITY])


def _hash_json(value) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
