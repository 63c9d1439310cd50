"""A folder of files and a split of it are rows of one table, and what is torn is one line."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import ROW, lines, refusal
from tokenizers_for_tests import plain_tokenizer

from sepo.data.read.load import load_rows
from sepo.data.read.read import read_pairs

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_name_of_a_kind_of_file_reads_nothing_of_the_working_folder(tmp_path, monkeypatch):
    lines(tmp_path / "rows.jsonl", ROW)
    (tmp_path / "notes.txt").write_text("secret")
    monkeypatch.chdir(tmp_path)
    for name in ("json", "csv", "text", "parquet", "imagefolder"):
        assert f"expected a file, a directory or a hub id, got {name}" in refusal(name)
    # but a folder of that name is that folder
    (tmp_path / "json").mkdir()
    lines(tmp_path / "json" / "train.jsonl", ROW | {"prompt": "Inside:"})
    (pair,) = read_pairs("json", plain_tokenizer()).pairs
    assert plain_tokenizer().decode(pair.prompt) == "Inside:"


def test_files_of_a_folder_need_not_have_the_same_columns_or_types(tmp_path):
    (tmp_path / "d").mkdir()
    lines(tmp_path / "d" / "train-1.jsonl", ROW)
    lines(tmp_path / "d" / "train-2.jsonl", ROW | {"id": 7, "score": "high"})
    lines(tmp_path / "d" / "train-3.jsonl", ROW | {"id": "x", "score": 0.5})
    data = read_pairs(tmp_path / "d", plain_tokenizer())
    assert [pair.id for pair in data.pairs] == ["0", "7", "x"]
    for kind in ("parquet", "arrow"):
        (tmp_path / kind).mkdir()
        for number, score in enumerate(("high", 0.5)):
            table = datasets.Dataset.from_list([ROW | {"score": score}])
            file = tmp_path / kind / f"train-{number}.{kind}"
            if kind == "parquet":
                table.to_parquet(file)
            else:
                table.save_to_disk(tmp_path / f"saved-{number}")
                next((tmp_path / f"saved-{number}").glob("*.arrow")).rename(file)
        assert len(read_pairs(tmp_path / kind, plain_tokenizer())) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_wrong_cell_is_named_with_its_file_row_and_column(tmp_path, suffix):
    (tmp_path / "d").mkdir()
    for number, row in enumerate([ROW, ROW | {"chosen": 3}, ROW]):
        if suffix == "jsonl":
            lines(tmp_path / "d" / f"train-{number}.jsonl", row)
        else:
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d" / f"train-{number}.parquet")
    message = refusal(tmp_path / "d")
    assert f"train-1.{suffix}: pair 1: expected chosen to be a string, got int" in message


def test_parts_of_a_split_as_the_datasets_library_names_them(tmp_path):
    (tmp_path / "d").mkdir()
    rows = [ROW | {"id": str(i)} for i in range(10)]
    lines(tmp_path / "d" / "train.jsonl", *rows[:7])
    lines(tmp_path / "d" / "test.jsonl", *rows[7:])
    for split, first, last, count in (
        (None, "0", "6", 7),
        ("test", "7", "9", 3),
        ("train[2:4]", "2", "3", 2),
        ("train[:50%]+test", "0", "9", 7),
        ("all", "0", "9", 10),
    ):
        found = [row["id"] for row in load_rows(tmp_path / "d", split=split)]
        assert (found[0], found[-1], len(found)) == (first, last, count), split
    assert [r["id"] for r in load_rows(tmp_path / "d" / "train.jsonl", split="train[5:]")] == [
        "5",
        "6",
    ]
    assert 'Unknown split "dev"' in refusal(tmp_path / "d", split="dev")
    part = load_rows(tmp_path / "d", split="train+test", skip=6, limit=2)
    assert [row["id"] for row in part] == ["6", "7"]
    assert [part.source(i).rsplit("/", 1)[1] for i in range(2)] == ["train.jsonl", "test.jsonl"]
    lines(tmp_path / "d" / "train-2.jsonl", *rows[:2])
    whole = load_rows(tmp_path / "d", split="train[1:]+test")
    counts = {name.rsplit("/", 1)[1]: count for name, count in whole.runs()}
    # a file's first row is left out, of whichever comes first
    assert counts in (
        {"train.jsonl": 6, "train-2.jsonl": 2, "test.jsonl": 3},
        {"train-2.jsonl": 1, "train.jsonl": 7, "test.jsonl": 3},
    )


def test_a_saved_folder_that_is_broken_is_one_line(tmp_path):
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"torn")
    assert refusal(tmp_path / "d").startswith(f"cannot read {tmp_path / 'd'}: ")


def test_parquet_whose_text_is_not_utf8(tmp_path):
    bytes_ = pa.array(["q", "qx"]).cast(pa.binary())
    wrong = pa.array([b"a", b"a\xe9"], pa.binary())
    text = lambda array: pa.Array.from_buffers(pa.string(), len(array), array.buffers())
    table = pa.table({"prompt": text(bytes_), "chosen": text(wrong), "rejected": text(bytes_)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "expected UTF-8 text" in refusal(tmp_path / "rows.parquet")
