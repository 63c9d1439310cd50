"""All that can be read of a store, to compare it with what was written; and damage done to it."""

from pathlib import Path

import numpy as np
import torch
from manifests import manifest

from sepo.data.hidden import HiddenRows, StoredHead
from sepo.data.store.store import ScoredStore, StoreWriter, pairs_hash
from sepo.data.types import ScoredPair

WIDTH, VOCABULARY = 3, 5
HEAD = StoredHead(torch.arange(15.0).reshape(5, 3), torch.arange(5.0), 0.5, 30.0)
ARRAYS = (
    "prompt",
    "chosen",
    "rejected",
    *(f"{s}_{w}" for s in ("chosen", "rejected") for w in ("score", "ref_logp", "weight")),
)


def whole_pairs(count: int = 6, length: int = 4) -> list[ScoredPair]:
    """Pairs with all that a store keeps. Every response has `length` tokens, so parts are alike."""
    rng = np.random.default_rng(0)
    rows = torch.randn(2 * count * length, WIDTH, generator=torch.manual_seed(0)).bfloat16()
    pairs = []
    for i in range(count):
        fields = {"prompt": rng.integers(0, VOCABULARY, length).astype(np.int32)}
        for j, side in enumerate(("chosen", "rejected")):
            fields[side] = rng.integers(0, VOCABULARY, length).astype(np.int32)
            for what in ("score", "ref_logp", "weight"):
                fields[f"{side}_{what}"] = rng.random(length).astype(np.float32)
            fields[f"{side}_ref_hidden"] = HiddenRows(rows, (2 * i + j) * length, length)
        pairs.append(ScoredPair(id=f"row {i}", **fields))
    return pairs


def write_whole(path: Path, pairs: list[ScoredPair] | None = None, *, per_part: int = 2) -> Path:
    pairs = pairs or whole_pairs()
    keep = ["hidden", "logp", "score"]
    about = dict(hidden_width=WIDTH, hidden_dtype="bfloat16", oracle_name="an oracle")
    about |= dict(source=pairs_hash(pairs), pairs=len(pairs), pairs_per_part=per_part, keep=keep)
    writer = StoreWriter(path, manifest(**about))
    writer.write_head(HEAD)
    for part in writer.missing():
        block = [pairs[i] for i in writer.pairs_of(part)]
        writer.write(part, block, note={"devices": ["cpu"], "precision_check": {"error": part + 1}})
    assert writer.finish()
    return path


def read_all(path: Path) -> list:
    """Everything that a store gives out, bit for bit; raises as it does."""
    store = ScoredStore.open(path)
    read = [store.manifest, store.lengths.tobytes()]
    for pair in store.pairs():
        read.append(pair.id)
        read += [getattr(pair, name).tobytes() for name in ARRAYS]
        for rows in (pair.chosen_ref_hidden, pair.rejected_ref_hidden):
            read.append(rows.whole().view(torch.uint8).numpy().tobytes())
    head = store.reference_head()
    read += [head.weight.numpy().tobytes(), head.bias.numpy().tobytes(), head.scale, head.softcap]
    return read


def flip(file: Path, bit: int) -> None:
    """Turn one bit of a file over; the same once more puts it right."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
