import csv
import json
import subprocess
import sys

import pytest
from tokenizers_for_tests import chatml_tokenizer, plain_tokenizer

from sepo.data.read.formats import DropReason
from sepo.data.read.read import REPEATED_ID, read_pairs
from sepo.data.read.tokenise import RowNote
from sepo.errors import InputError

datasets = pytest.importorskip("datasets")
ROWS = [
    {"prompt": "Tell me:", "chosen": "The river.", "rejected": "The world."},
    {"prompt": "Tell me:", "chosen": "42", "rejected": "None"},
    {"prompt": "Tell me:", "chosen": "", "rejected": "b"},
    {"prompt": "Tell me:", "chosen": "same", "rejected": "same"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files_of_every_kind_give_the_same(tmp_path, suffix):
    tokenizer = plain_tokenizer()
    data = read_pairs(write(tmp_path / f"rows.{suffix}", ROWS), tokenizer)
    assert [p.id for p in data.pairs] == ["0", "1"] and len(data) == len(data.notes) == 2
    assert tokenizer.decode(data.pairs[1].chosen) == "42<|endoftext|>"
    assert tokenizer.decode(data.pairs[1].rejected) == "None<|endoftext|>"
    counts = data.report.as_dict()
    assert counts["read"] == 4 and counts["kept"] == 2
    assert counts["dropped"] == {DropReason.EMPTY: 1, DropReason.SAME: 1}
    json.dumps(counts)
    assert "1 a response is empty (pair 2)" in str(data.report)


def test_saved_directories(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "two")
    assert len(read_pairs(tmp_path / "one", plain_tokenizer())) == 2
    assert read_pairs(tmp_path / "two", plain_tokenizer(), split="test").report.read == 1
    with pytest.raises(InputError, match="expected a split out of train, test in .*, got dev"):
        read_pairs(tmp_path / "two", plain_tokenizer(), split="dev")


def test_a_directory_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", ROWS)
    assert len(read_pairs(tmp_path / "data", plain_tokenizer())) == 2


def test_limit_and_skip_count_rows_and_keep_their_numbers(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    data = read_pairs(path, plain_tokenizer(), skip=1, limit=2)
    assert [p.id for p in data.pairs] == ["1"] and data.report.read == 2
    with pytest.raises(InputError, match="expected skip to leave rows of the 4 in"):
        read_pairs(path, plain_tokenizer(), skip=4)
    with pytest.raises(InputError, match="limit >= 1"):
        read_pairs(path, plain_tokenizer(), limit=0)


def test_batches_keep_the_order_and_the_numbers(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS[:2] * 5)
    whole = read_pairs(path, plain_tokenizer())
    monkeypatch.setattr("sepo.data.read.BATCH", 3)
    parts = read_pairs(path, plain_tokenizer())
    assert [p.id for p in parts.pairs] == [str(i) for i in range(10)]
    assert all((a.chosen == b.chosen).all() for a, b in zip(whole.pairs, parts.pairs, strict=True))
    assert parts.report.as_dict() == whole.report.as_dict()


def test_progress_shows_a_bar(tmp_path, capsys):
    read_pairs(write(tmp_path / "rows.jsonl", ROWS), plain_tokenizer(), progress=True)
    assert "tokenise" in capsys.readouterr().err
    read_pairs(write(tmp_path / "rows.jsonl", ROWS[:1]), plain_tokenizer())
    assert capsys.readouterr().err == ""


def test_a_repeated_id_is_made_unique(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | {"id": "x"} for row in ROWS[:2]])
    data = read_pairs(path, plain_tokenizer())
    assert [p.id for p in data.pairs] == ["x", "x#1"] and data.report.noted[REPEATED_ID] == 1


def test_fields_and_token_ids_without_a_tokenizer(tmp_path):
    row = {"p": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 4], "chosen_mask": [0, 1, 1]}
    path = write(tmp_path / "rows.jsonl", [row])
    (pair,) = read_pairs(path, None, fields={"prompt_ids": "p"}).pairs
    assert (pair.prompt.tolist(), pair.chosen.tolist()) == ([1, 2], [3, 4, 5])
    assert pair.chosen_weight.tolist() == [0, 1, 1] and pair.rejected_weight is None


def test_messages_from_a_table_with_filled_keys(tmp_path):
    turns = [{"role": "user", "content": "Tell me", "name": "Ann"}]
    answer = [{"role": "assistant", "content": "The river."}]
    rows = [{"prompt": turns, "chosen": answer, "rejected": [answer[0] | {"content": "No."}]}]
    data = read_pairs(write(tmp_path / "rows.parquet", rows), chatml_tokenizer())
    assert chatml_tokenizer().decode(data.pairs[0].rejected).endswith("No.<|im_end|>")


def test_cuts_are_in_the_report_and_with_the_pair(tmp_path):
    data = read_pairs(write(tmp_path / "rows.jsonl", ROWS), plain_tokenizer(), max_length=6)
    assert [len(p.rejected) for p in data.pairs] == [3, 3]
    assert data.notes == [(RowNote.CUT_CHOSEN, RowNote.CUT_REJECTED), (RowNote.CUT_REJECTED,)]
    assert data.report.as_dict()["noted"] == {RowNote.CUT_CHOSEN: 1, RowNote.CUT_REJECTED: 2}
    assert "2 rejected cut at max_length (pair 0, 1)" in str(data.report)


def test_missing_things_are_named_and_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", never)
    for source in ("rows.jsonl", "here/rows.csv", "./rows", "/a/b", "a/b/c", "here/", "~/rows"):
        with pytest.raises(InputError, match=f"no such file or directory: {source}"):
            read_pairs(source, plain_tokenizer())
    with pytest.raises(InputError, match="cannot read owner/name: AssertionError: asked the hub"):
        read_pairs("owner/name", plain_tokenizer())  # the check above can fail


def test_unreadable_sources_are_one_line(tmp_path):
    tokenizer = plain_tokenizer()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty.jsonl, got an empty file"):
        read_pairs(tmp_path / "empty.jsonl", tokenizer)
    (tmp_path / "none.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(InputError, match="expected rows in .*none.csv, got none"):
        read_pairs(tmp_path / "none.csv", tokenizer)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="cannot read .*broken.parquet: ArrowInvalid"):
        read_pairs(tmp_path / "broken.parquet", tokenizer)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(InputError, match="suffix out of .json, .jsonl, .csv, .parquet, got"):
        read_pairs(tmp_path / "rows.txt", tokenizer)
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        InputError, match='cannot read .*rows.jsonl: ValueError: Unknown split "dev"'
    ):
        read_pairs(path, tokenizer, split="dev")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="got a scored store"):
        read_pairs(tmp_path, tokenizer)


def test_no_row_left_says_why(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[2:])
    with pytest.raises(
        InputError, match="no row of .* can be used: 1 a response is empty; 1 the tw"
    ):
        read_pairs(path, plain_tokenizer())


def test_importing_the_readers_does_not_import_transformers_or_datasets():
    code = (
        f"import sys; sys.path[:] = {sys.path}; import sepo.data.read; "
        "print({'transformers', 'datasets'} & set(sys.modules))"
    )
    # in a process of its own: this one has imported everything
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
