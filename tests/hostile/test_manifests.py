"""A manifest with any value in the place of any entry: refused, or read to the end."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import chatml_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "report"))
from reports import scored, write_store

from sepo.data.store.store import MANIFEST, ScoredStore, StoreWriter, read_manifest, verify_store
from sepo.errors import InputError
from sepo.model.reference import cached_reference
from sepo.report import collect, render_page
from sepo.score.score import score_dataset
from sepo.transfer.store import transfer_store

DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = (
    None, True, -1, 0, 1, 2, 7, 10**9, 10**15, 10**40, 1.5, 1e308, float("nan"), float("inf"), "",
    "x", "\ud800", "\x1b[2J", "float32", "score", [], [None], ["score"], ["logp"], ["x"], {},
    {"from": []}, {"dropped": {"a": []}}, {"a": float("nan")}, {"a": DEEP}, DEEP,
)  # fmt: skip
ENTRIES = {
    "tokenizer_name": "t", "oracle_name": "o", "reference_name": "r", "hidden_width": None,
    "max_length": 9, "reading": {"source": "s", "dropped": {"why": 1}}, "precision_check": None,
    "transferred": {"from": "there"}, "oracle_arithmetic": "split", "arithmetic_reason": "asked",
}  # fmt: skip


def readers(path: Path) -> dict:
    tokenizer = chatml_tokenizer()
    opened = lambda: ScoredStore.open(path, tokenizer)
    about = dict(keep="logp", dtype=torch.float32)
    scoring = dict(reference=None, oracle=None, tokenizer=tokenizer, progress=False)
    carrying = dict(oracle_tokenizer=tokenizer, policy_tokenizer=tokenizer, progress=False)
    return {
        "open": opened,
        "verify": lambda: verify_store(path),
        "report": lambda: render_page(collect([path], [tokenizer])),
        "reference": lambda: cached_reference("r", {"data": opened()}, tokenizer, **about),
        "score": lambda: score_dataset(opened(), path / "out", **scoring),
        "go on": lambda: StoreWriter(path, read_manifest(path)).finish(),
        "transfer": lambda: transfer_store(opened(), _NoRows, (), path / "out", **carrying),
    }


class _NoRows:
    pairs = ()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pairs = [scored(f"row {i}", seed=i) for i in range(9)]
    return write_store(tmp_path_factory.mktemp("store") / "store", pairs, **ENTRIES)


def entries(path: Path) -> dict:
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["check"]  # as older versions wrote it, and people edit it
    return manifest


NAMES = sorted({
    *ENTRIES, "format", "tokenizer", "chat_template", "oracle", "oracle_dtype", "reference",
    "reference_dtype", "source", "keep", "pairs", "pairs_per_part", "complete", "devices", "tokens",
    "check",
})  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_value(path, figures, name):
    whole = (path / MANIFEST).read_text()
    manifest, seen = entries(path), Counter()
    without = {key: value for key, value in manifest.items() if key != name}
    for changed in [without, *(manifest | {name: value} for value in VALUES)]:
        for read in readers(path).values():
            (path / MANIFEST).write_text(json.dumps(changed))
            try:
                read()
                seen["read"] += 1
            except InputError:
                seen["refused"] += 1
    (path / MANIFEST).write_text(whole)
    figures("manifests", tried=sum(seen.values()), **seen)
    assert seen["refused"] > 0


def test_the_whole_one_is_read(path):
    for name, read in readers(path).items():
        if name in ("open", "verify", "report", "go on"):
            read()
