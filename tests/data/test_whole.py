"""A store is as it was written, or it is refused; what an older version wrote is read with a note."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from whole_stores import flip, read_all, write_whole

from sepo.data.hidden import HEAD_FILE
from sepo.data.store.store import MANIFEST, ScoredStore, verify_store
from sepo.errors import InputError

OLD = Path(__file__).parents[1] / "fixtures" / "old_store"  # written before there were checksums
DAMAGED = "its contents are not those that were written; delete it and score again"
PARTS = [f"part-0000{i}-of-00003" for i in range(3)]


@pytest.fixture
def store(tmp_path):
    return write_whole(tmp_path / "store")


def test_flipped_bits(store):
    """In every file, wherever they fall: refused, or nothing that is read is another."""
    expected, draw = read_all(store), random.Random(0)
    for file in sorted(store.iterdir()):
        refused = 0
        for _ in range(25):
            bit = draw.randrange(8 * file.stat().st_size)
            flip(file, bit)
            try:
                assert read_all(store) == expected, f"bit {bit} of {file.name}"
            except InputError:
                refused += 1
            flip(file, bit)
        assert refused > 5, file.name
    assert read_all(store) == expected


@pytest.mark.parametrize("ending", [".parquet", ".safetensors"])
def test_a_part_in_the_place_of_another(store, ending):
    for old, new in ((PARTS[1], PARTS[0]), (PARTS[0], PARTS[2])):
        file = store / (new + ending)
        before = file.read_bytes()
        shutil.copy(store / (old + ending), file)
        number, found = int(new[9]), int(old[9])
        with pytest.raises(InputError, match=f"{file.name}: expected part {number}, found {found}"):
            ScoredStore.open(store)
        file.write_bytes(before)
    ScoredStore.open(store)


def test_the_pairs_of_a_part(store):
    """A part that says it is of this place but holds other pairs: of another size of parts."""
    file = store / f"{PARTS[0]}.parquet"
    about(file, lambda found: found | {"pairs": [2, 4]})
    with pytest.raises(InputError, match=r"expected pairs from and up to \[0, 2\], found \[2, 4\]"):
        ScoredStore.open(store)


def about(file, change):
    """Write a part again with something else said of it."""
    table = pq.ParquetFile(file).read()
    found = change(json.loads(table.schema.metadata[b"sepo"]))
    pq.write_table(table.replace_schema_metadata({"sepo": json.dumps(found)}), file)


@pytest.mark.parametrize("entry", ["devices", "precision_check", "tokens"])
def test_what_a_part_says_is_under_its_checksum(store, entry):
    other = {"devices": ["cuda"], "precision_check": {"error": 0}, "tokens": 1}
    about(store / f"{PARTS[1]}.parquet", lambda found: found | {entry: other[entry]})
    with pytest.raises(InputError, match=f"{PARTS[1]}.parquet: {DAMAGED}"):
        ScoredStore.open(store)


def test_a_part_of_other_values(store):
    """A whole parquet file, which its pages' checksums can't tell from what was written."""
    file = store / f"{PARTS[1]}.parquet"
    table = pq.ParquetFile(file).read()
    index = table.schema.get_field_index("chosen_score")
    values = table.column("rejected_score")
    pq.write_table(table.set_column(index, table.schema.field(index), values), file)
    with pytest.raises(InputError, match=f"{PARTS[1]}.parquet: {DAMAGED}"):
        ScoredStore.open(store)


def test_pages_have_checksums_that_are_compared(store):
    """Before anything is decoded: a decoder is not made for what is no page."""
    file = store / f"{PARTS[0]}.parquet"
    column = pq.read_metadata(file).row_group(0).column(1)
    flip(file, 8 * (column.data_page_offset + column.total_compressed_size - 9))
    with pytest.raises(InputError, match="cannot be read .*CRC checksum verification failed"):
        ScoredStore.open(store)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda rows: rows * float("nan")])
def test_hidden_rows_of_other_values(store, change):
    file = store / f"{PARTS[1]}.safetensors"
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    rows = load_file(file)["hidden"].clone()
    rows[4:8] = change(rows[4:8])  # the first pair's rejected response
    save_file({"hidden": rows}, file, metadata=said)
    found = ScoredStore.open(store)  # its rows are not read
    found[2].chosen_ref_hidden.read(np.array([0], np.int32))
    message = rf"{file.name} \(rows 4 to 8\): {DAMAGED}"
    with pytest.raises(InputError, match=message):
        found[2].rejected_ref_hidden.read(np.array([0], np.int32))
    with pytest.raises(InputError, match=message):
        verify_store(store)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_of_other_values(store, name):
    file = store / HEAD_FILE
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name][2] = 0
    save_file(tensors, file, metadata=said)
    found = ScoredStore.open(store)
    for read in (found.reference_head, lambda: verify_store(store)):
        with pytest.raises(InputError, match=f"{HEAD_FILE}: {DAMAGED}"):
            read()


def test_verify_names_every_file(store):
    torn, flipped = store / f"{PARTS[0]}.parquet", store / f"{PARTS[2]}.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    flip(flipped, 8 * flipped.stat().st_size - 1)
    with pytest.raises(InputError, match=f"2 files are not whole: .*{PARTS[0]}.*{PARTS[2]}"):
        verify_store(store)


def test_verify_compares_the_pairs_with_those_that_were_scored(store):
    for name in PARTS[:2]:
        about(store / f"{name}.parquet", without_checks)
    for ending in (".parquet", ".safetensors"):
        a, b = (store / (name + ending) for name in PARTS[:2])
        shutil.copy(a, store / "a"), shutil.copy(b, a), shutil.copy(store / "a", b)
    for name in PARTS[:2]:
        file = store / f"{name}.safetensors"
        with safe_open(file, framework="pt") as opened:
            said = json.loads(opened.metadata()["sepo"])
        tensors = {"hidden": load_file(file)["hidden"].clone()}
        save_file(tensors, file, metadata={"sepo": json.dumps({"run": said["run"]})})
    assert ScoredStore.open(store)[0].id == "row 2"  # an old store can't tell
    with pytest.raises(InputError, match="expected the pairs that were scored .*, found others"):
        verify_store(store)


def without_checks(found: dict) -> dict:
    return {key: found[key] for key in ("run", "tokens")}


def test_a_store_of_an_older_version(caplog):
    store = ScoredStore.open(OLD)
    assert [record.message for record in caplog.records] == [
        f"{OLD}: 2 of 2 parts have no checksums, which older versions didn't write: damage to "
        "their values can't be seen"
    ]
    assert [pair.id for pair in store.pairs()] == ["row 0", "row 1", "row 2"]
    pair = store[2]
    assert pair.chosen.tolist() == [7, 6]
    assert pair.chosen_score.tolist() == [-0.20917557179927826, -0.15922501683235168]
    assert pair.rejected_ref_logp.tolist() == [1.4934310913085938, -1.2590655088424683]
    assert pair.rejected_ref_hidden.whole()[0].tolist() == [0.44140625, -0.1025390625, 0.79296875]
    assert store.reference_head().bias.tolist() == [0, 1, 2, 3, 4]
    assert verify_store(OLD).manifest["tokens"] == int(store.lengths.sum())


def test_a_new_store_has_no_note(store, caplog):
    verify_store(store)
    assert not caplog.records


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("pairs", "many", "a whole number from 1 to"),
        ("pairs", 0, "a whole number from 1 to"),
        ("pairs", 6.0, "a whole number from 1 to"),
        ("pairs_per_part", None, "a whole number from 1 to"),
        ("pairs_per_part", True, "a whole number from 1 to"),
        ("pairs_per_part", 1 << 70, "a whole number from 1 to"),
        ("keep", "score", "a list of text"),
        ("keep", [1], "a list of text"),
        ("tokenizer", ["t"], "text"),
        ("reference_dtype", "float31", "float64, float32, bfloat16, float16 or null"),
        ("oracle_name", {}, "text or null"),
        ("hidden_width", "3", "a whole number from 1 to"),
        ("max_length", -1, "a whole number from 1 to"),
        ("reading", "many rows", "an object of finite numbers"),
        ("precision_check", {"error": float("inf")}, "an object of finite numbers"),
        ("transferred", "from", "an object of finite numbers"),
    ],
)
def test_entries_that_can_not_be(store, entry, value, words):
    rewrite(store, lambda manifest: manifest | {entry: value})
    with pytest.raises(InputError, match=f"{MANIFEST}: expected {entry} to be {words}"):
        ScoredStore.open(store)


@pytest.mark.parametrize("entry", ["pairs", "pairs_per_part", "keep", "reference", "source"])
def test_entries_that_are_lacking(store, entry):
    rewrite(store, lambda manifest: {k: v for k, v in manifest.items() if k != entry})
    with pytest.raises(InputError, match=f"{MANIFEST}: expected {entry}, .*, got none"):
        ScoredStore.open(store)


@pytest.mark.parametrize("pairs", [10**9, 10**15])
def test_a_number_of_pairs_that_nobody_has(store, pairs):
    """Answered by what is there, at once, not by going through all that should be."""
    rewrite(store, lambda manifest: manifest | {"pairs": pairs, "pairs_per_part": 1})
    message = rf"{pairs} of {pairs} parts are missing \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"
    for read in (ScoredStore.open, verify_store):
        with pytest.raises(InputError, match=message):
            read(store)


def rewrite(store, change):
    """A manifest without a checksum, as older versions wrote it, and as people edit it."""
    manifest = json.loads((store / MANIFEST).read_text())
    del manifest["check"]
    (store / MANIFEST).write_text(json.dumps(change(manifest)))


def test_an_entry_that_was_changed(store):
    file = store / MANIFEST
    file.write_text(file.read_text().replace("an oracle", "another"))
    with pytest.raises(InputError, match=f"{MANIFEST}: its contents are not those that were"):
        ScoredStore.open(store)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100000, b'{"format": ' + b"9" * 5000])
def test_a_manifest_that_is_none(store, text):
    (store / MANIFEST).write_bytes(text)
    with pytest.raises(InputError, match="expected the JSON manifest of a scored store"):
        ScoredStore.open(store)


def test_truncated_files(store):
    """Cut anywhere, every file is refused."""
    for file in sorted(store.iterdir()):
        whole = file.read_bytes()
        for left in (0, 1, 7, 8, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 2):
            file.write_bytes(whole[:left])
            with pytest.raises(InputError, match=file.name):
                read_all(store)
        file.write_bytes(whole)
    read_all(store)
