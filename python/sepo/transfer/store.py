"""Write an oracle's scores for a policy whose tokenizer is another.

The store has the oracle's tokens of each response and the policy's reading of the same rows has
the policy's; both are laid over the bytes of the text, as `sepo.data.align` says.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sepo
from sepo.data.align import TokenBytes
from sepo.data.read.formats import Preference, TokenIds, find_format
from sepo.data.read.load import load_rows
from sepo.data.read.read import PairSet, named_rows
from sepo.data.read.render import spans
from sepo.data.selection import Selection
from sepo.data.store.manifest import begun_with
from sepo.data.store.store import (
    FORMAT,
    ScoredStore,
    StoreWriter,
    pairs_hash,
    read_manifest,
    template_hash,
    tokenizer_hash,
)
from sepo.data.types import ScoredPair
from sepo.errors import InputError
from sepo.system.lock import lock
from sepo.transfer.row import Aggregate, Coverage, Mode, RowAligner, SkippedRow

FRACTION = 0.3
OWNER = "transfer"  # of the lock of the store that is written
MODELS = tuple(
    f"{role}{what}" for role in ("oracle", "reference") for what in ("", "_dtype", "_name")
)


def transfer_store(
    store: ScoredStore,  # with scores
    data: PairSet,  # the same rows, read with the policy's tokenizer
    preferences: Iterable[Preference],  # the same rows, as text
    output_dir: str | os.PathLike,
    *,
    oracle_tokenizer: Any,  # made the store's pairs
    policy_tokenizer: Any,  # made `data`
    mode: Mode = "score",
    aggregate: Aggregate = "mean",  # score: over a token's bytes; max: the most decisive of them
    fraction: float = FRACTION,  # overlap: of the oracle's tokens selected
    pairs_per_part: int = 128,
    max_length: int | None = None,  # to which `data` was cut, for the manifest
    progress: bool = True,
) -> Coverage:
    """Write a scored store in the policy's tokens; rows that can't be aligned are named in it.

    "score": a token gets the mean, or the most decisive (chosen: highest, rejected: lowest), of its
    bytes' scores, in nats; one without any gets 0 or the least decisive score, whichever is less
    so. "overlap": tokens that hold a byte of one of the oracle's selected tokens get weight 1, all
    others 0. Raises InputError for a tokenizer that is not fast or not the store's, a store without
    scores, rows of token ids, an `output_dir` that holds something else, can't be written to or is
    being written to, and if no row is left.
    """
    _check_store(store, oracle_tokenizer)
    if pairs_per_part < 1:
        raise InputError(f"pairs_per_part: expected at least 1, got {pairs_per_part}")
    transferred = {
        "from": str(store.path),
        "mode": mode,
        **({"aggregate": aggregate} if mode == "score" else {"fraction": fraction}),
        **{name: store.manifest.get(name) for name in ("tokenizer", "tokenizer_name", "source")},
    }
    with lock(output_dir, OWNER):
        _refuse_another(Path(output_dir), transferred)
        begun = begun_with(Path(output_dir), "tokenizer")
        align_row = RowAligner(
            TokenBytes(oracle_tokenizer),
            TokenBytes(policy_tokenizer),
            is_same=store.manifest["tokenizer"]
            == tokenizer_hash(policy_tokenizer, like=store.manifest["tokenizer"]),
            mode=mode,
            aggregate=aggregate,
            selection=Selection("selected", fraction=fraction),
        )
        read = lambda one: (spans(one, oracle_tokenizer), spans(one, policy_tokenizer))
        rows = tqdm(preferences, desc="align", unit="row", disable=not progress)
        pairs, coverage = _align(store, data, rows, align_row, read)
        manifest = {
            "format": FORMAT,
            "sepo": sepo.__version__,
            "tokenizer": tokenizer_hash(policy_tokenizer, like=begun),
            "tokenizer_name": policy_tokenizer.name_or_path,
            "chat_template": template_hash(policy_tokenizer),
            **{name: store.manifest.get(name) for name in MODELS},
            "source": pairs_hash(pairs),
            "reading": data.report.as_dict(),
            "max_length": max_length,
            "keep": ["score" if mode == "score" else "weight"],
            "pairs": len(pairs),
            "pairs_per_part": pairs_per_part,
            "transferred": transferred | {"coverage": coverage.as_dict()},
        }
        _write(Path(output_dir), manifest, pairs, store)
    return coverage


def _align(
    store: ScoredStore,
    data: PairSet,
    preferences: Iterable[Preference],
    align_row: RowAligner,
    read: Callable,  # a row's texts as the oracle and as the policy reads it
) -> tuple[list[ScoredPair], Coverage]:
    index = {pair.id: i for i, pair in enumerate(store.pairs())}
    targets = {pair.id: pair for pair in data.pairs}
    coverage, pairs = Coverage(), []
    for one in preferences:
        target = targets.get(one.id)
        if target is None or one.id not in index:
            if target is not None:
                coverage.leave_out(SkippedRow.NOT_SCORED, one.id)
            continue
        if isinstance(one, TokenIds):
            raise InputError(
                f"pair {one.id}: expected text, which any tokenizer reads, got token ids"
            )
        carried = align_row(store[index.pop(one.id)], target, read(one), coverage.counts)
        if isinstance(carried, SkippedRow):
            coverage.leave_out(carried, one.id)
        else:
            pairs.append(carried)
    for id in index:
        coverage.leave_out(SkippedRow.NOT_READ, id)
    coverage.rows = len(pairs)
    if not pairs:
        why = "; ".join(f"{len(ids)} {why}" for why, ids in coverage.left_out.items())
        raise InputError(f"{store.path}: expected rows that can be carried, got none: {why}")
    return pairs, coverage


def _check_store(store: ScoredStore, tokenizer: Any) -> None:
    manifest = store.manifest
    if "score" not in manifest["keep"]:
        raise InputError(f"{store.path}: expected a store with scores, got {manifest['keep']}")
    for name, found in (
        ("tokenizer", tokenizer_hash(tokenizer, like=manifest["tokenizer"])),
        ("chat_template", template_hash(tokenizer)),
    ):
        if found != manifest[name]:
            raise InputError(
                f"{store.path}: expected the {name.replace('_', ' ')} that made the store, of "
                f"{manifest.get('tokenizer_name')} ({manifest[name][:12]}), got that of "
                f"{tokenizer.name_or_path} ({found[:12]})"
            )


def _refuse_another(path: Path, transferred: dict) -> None:
    """Raise InputError where a store lies of which any of this is not so."""
    present = read_manifest(path)
    if present is None:
        return
    found = present.get("transferred") or {}
    if any(found.get(key) != value for key, value in transferred.items()):
        raise InputError(
            f"{path}: expected an empty directory or this transfer begun, got another store; "
            "choose another directory, or delete this one"
        )


def _write(path: Path, manifest: dict, pairs: list[ScoredPair], store: ScoredStore) -> None:
    _refuse_another(path, manifest["transferred"])
    writer = StoreWriter(path, manifest, owner=OWNER)
    about = {name: store.manifest.get(name) for name in ("devices", "precision_check")}
    for part in writer.missing():
        writer.write(part, [pairs[i] for i in writer.pairs_of(part)], note=about)
    writer.finish()


def read_preferences(
    source: Any, *, split: str = "train", config: str | None = None, limit: int | None = None
) -> Iterator[Preference]:
    """The rows that `read_pairs` tokenises, under the same ids; what it drops unread is left out."""
    rows = load_rows(source, split=split, config=config, limit=limit)
    form = find_format(rows.column_names)
    return (one for one, _ in named_rows(rows, form) if isinstance(one, Preference))
