"""Rows scored under one tokenizer and carried to another."""

import json

import numpy as np

from sepo.data.read.read import read_pairs
from sepo.data.store.store import (
    ScoredStore,
    StoreWriter,
    pairs_hash,
    template_hash,
    tokenizer_hash,
)
from sepo.data.types import ScoredPair
from sepo.transfer.store import read_preferences, transfer_store

ROWS = [
    {"prompt": "Say:", "chosen": " the river is wide", "rejected": " the world 🧑🏽‍🔬"},
    {"prompt": "Go on. Q:", "chosen": "\n  more\tof it", "rejected": " it: café and cafe\u0301"},
    {"prompt": "Go on. A:", "chosen": " the answer.", "rejected": " hello\r\n"},
]
QUIET = dict(progress=False)


def turns(row):
    message = lambda role, text: [{"role": role, "content": text}]
    chosen, rejected = (message("assistant", row[side]) for side in ("chosen", "rejected"))
    return {"prompt": message("user", row["prompt"]), "chosen": chosen, "rejected": rejected}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored(pairs, draw=None):
    """Pairs with random scores: neighbours have nothing in common, the hardest case to carry."""
    rng = np.random.default_rng(0)
    draw = draw or (lambda ids: rng.normal(size=len(ids)).astype(np.float32))
    return [
        ScoredPair(
            id=p.id, prompt=p.prompt, chosen=p.chosen, rejected=p.rejected,
            chosen_score=draw(p.chosen), rejected_score=draw(p.rejected),
        )
        for p in pairs
    ]  # fmt: skip


def make_store(path, data, tokenizer, keep=("score",), draw=None, **options):
    """What `sepo score` would write, with random scores."""
    pairs = read_pairs(data, tokenizer, **options).pairs
    manifest = {
        "format": 1, "tokenizer": tokenizer_hash(tokenizer), "tokenizer_name": "the oracle's",
        "chat_template": template_hash(tokenizer), "oracle": "some", "oracle_dtype": "float32",
        "reference": "other", "reference_dtype": "float32", "source": pairs_hash(pairs),
        "keep": list(keep), "pairs": len(pairs), "pairs_per_part": 2,
    }  # fmt: skip
    writer = StoreWriter(path, manifest)
    values = scored(pairs, draw)
    for part in writer.missing():
        block = [values[i] for i in writer.pairs_of(part)]
        writer.write(part, block, note={"devices": ["cpu"]})
    writer.finish()
    return ScoredStore.open(path, tokenizer)


def carry(tmp_path, rows, source, target, *, out="out", reading=(), **options):
    data = write(tmp_path / "rows.jsonl", rows)
    store = make_store(tmp_path / "scores", data, source)
    reading = dict(reading)
    coverage = transfer_store(
        store, read_pairs(data, target, **reading), read_preferences(data), tmp_path / out,
        oracle_tokenizer=source, policy_tokenizer=target, **QUIET, **options,
    )  # fmt: skip
    return store, ScoredStore.open(tmp_path / out, target), coverage
