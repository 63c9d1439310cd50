"""Rows reach the formats as their files have them, and a wrong file is named with its line."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import ROW, lines, refusal
from tokenizers_for_tests import chatml_tokenizer, plain_tokenizer

from sepo.data.read.load import is_rows, load_rows
from sepo.data.read.read import read_pairs
from sepo.data.read.reasons import DropReason
from sepo.data.types import TokenPair
from sepo.errors import InputError

datasets = pytest.importorskip("datasets")
ARGUMENTS = [  # of one call a row: what one table of all rows would change
    {"date": "2024-05-01"},
    {"date": "2024-05-01T10:00:00", "count": 3},
    {"z": None, "a": [1, "two", None], "m": {"y": 2.50, "x": 10**20}},
    {},
    {"count": "three", "date": None},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def call(arguments) -> dict:
    """A row whose chosen response calls a tool."""
    name = {"function": {"name": "book", "arguments": arguments}}
    return {
        "prompt": [{"role": "user", "content": "Book it"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [name]}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }


def calling_tokenizer():
    """Its template prints the arguments of a call as JSON."""
    tokenizer = chatml_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for t in m.tool_calls or [] %}{{ t.function.name }} "
        "{{ t.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    return tokenizer


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "a folder", "a list"])
def test_nested_values_reach_the_template_as_the_file_has_them(tmp_path, kind):
    rows = [call(arguments) for arguments in ARGUMENTS]
    source = rows
    if kind == "json":
        (source := tmp_path / "rows.json").write_text(json.dumps(rows))
    elif kind == "jsonl":
        source = lines(tmp_path / "rows.jsonl", *rows)
    elif kind == "a folder":
        (source := tmp_path / "data").mkdir()
        lines(source / "train.jsonl", *rows)
    data = read_pairs(source, calling_tokenizer())
    shown = [calling_tokenizer().decode(pair.chosen) for pair in data.pairs]
    assert shown == [f"book {json.dumps(a)}<|im_end|>" for a in ARGUMENTS]
    assert not data.report.noted


def test_a_key_of_one_row_is_no_key_of_another(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>\n{% endfor %}"
    turns = [
        {"content": "x", "role": "user", "name": "Ann"},
        {"role": "user", "content": "y"},
    ]
    rows = [ROW | {"prompt": [turn]} for turn in turns]
    data = read_pairs(lines(tmp_path / "rows.jsonl", *rows), chatml_tokenizer(template))
    for pair, turn in zip(data.pairs, turns, strict=True):
        assert f"{json.dumps(turn)}<|im_end|>" in chatml_tokenizer().decode(pair.prompt)


def test_what_a_table_filled_is_taken_off_and_what_its_cells_hold_is_not(tmp_path):
    rows = [call(json.dumps(a)) for a in ARGUMENTS]
    rows[0]["chosen"][0]["tool_calls"][0]["id"] = "first"  # filled with None in all others
    rows = [row | {"tools": json.dumps([{"name": "book", "default": None}])} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% for t in m.tool_calls or [] %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    tokenizer = chatml_tokenizer(template)
    pairs = read_pairs(tmp_path / "rows.parquet", tokenizer).pairs
    text = tokenizer.decode(pairs[4].chosen)
    assert '"id"' not in text and json.dumps({"arguments": json.dumps(ARGUMENTS[4])})[1:-1] in text
    assert tokenizer.decode(pairs[4].prompt).startswith('[{"name": "book", "default": null}]')
    assert '"id": "first"' in tokenizer.decode(pairs[0].chosen)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (datetime.date(2024, 5, 1), "date"),
        (datetime.datetime(2024, 5, 1), "datetime"),
        (b"abc", "bytes"),
        (datetime.timedelta(1), "timedelta"),
    ],
)
def test_what_json_cannot_say_is_refused_and_not_printed_as_its_types_name(tmp_path, value, kind):
    pq.write_table(pa.Table.from_pylist([call({"when": value})]), tmp_path / "rows.parquet")
    with pytest.raises(
        InputError, match=f"rows.parquet: pair 0: expected tool_calls in chosen .*{kind}"
    ):
        read_pairs(tmp_path / "rows.parquet", calling_tokenizer())
    with pytest.raises(
        InputError, match=f"pair 0: expected tools to hold what JSON can say, got {kind}"
    ):
        read_pairs([call({}) | {"tools": [{"default": value}]}], calling_tokenizer())


def test_a_column_that_only_later_rows_have_is_a_column(tmp_path):
    path = lines(tmp_path / "rows.jsonl", ROW, ROW | {"system": "Be brief."})
    data = read_pairs(path, chatml_tokenizer())
    assert "Be brief." in chatml_tokenizer().decode(data.pairs[1].prompt)
    # a column system makes strings a conversation, in every row
    assert "<|im_start|>user\nTell me:" in chatml_tokenizer().decode(data.pairs[0].prompt)
    rows = load_rows(path)
    assert rows.column_names == ["prompt", "chosen", "rejected", "system"]
    assert rows["system"] == [None, "Be brief."] == [row["system"] for row in rows]


def test_pictures_are_counted_and_not_decoded(tmp_path):
    columns = dict.fromkeys(("prompt", "chosen", "rejected"), datasets.Value("string"))
    pictures = datasets.List(datasets.Image())
    rows = [ROW | {"images": value} for value in ([{"bytes": b"none", "path": None}], [], None)]
    table = datasets.Dataset.from_list(
        rows, features=datasets.Features(columns | {"images": pictures})
    )
    table.to_parquet(tmp_path / "rows.parquet")
    for source in (table, tmp_path / "rows.parquet"):
        data = read_pairs(source, plain_tokenizer())
        assert [pair.id for pair in data.pairs] == ["1", "2"]
        assert data.report.dropped == {DropReason.UNSERVED: 1}
    assert table.features["images"].feature.decode  # the caller's is as it was


def test_json_in_the_cells_of_a_table_keeps_its_nulls():
    features = {k: datasets.Value("string") for k in ROW} | {
        "tools": datasets.List(datasets.Json())
    }
    tools = [{"name": "map", "default": None}]
    table = datasets.Dataset.from_list(
        [ROW | {"tools": tools}], features=datasets.Features(features)
    )
    assert [row["tools"] for row in load_rows(table)] == [tools]


# --- bytes and lines -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
    text = json.dumps(ROW) if "json" in name else "prompt,chosen,rejected\nTell me:,a,b\n"
    text = f"[{text}]" if name == "rows.json" else text
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (pair,) = read_pairs(tmp_path / name, plain_tokenizer()).pairs
    assert plain_tokenizer().decode(pair.prompt) == "Tell me:"


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.csv", "prompt,chosen,rejected\nq,a,b\nqué,a,b\n", "line 3.* 0xe9 at place 3"),
        ("rows.csv", "prompté,chosen,rejected\nq,a,b\n", "line 1.* 0xe9 at place 7"),
        ("rows.jsonl", '{"prompt": "q"}\n\n{"prompt": "é"}\n', "line 3.* 0xe9 at place 13"),
        ("rows.json", '[{"prompt": "q"},\n{"prompt": "é"}]', "line 2.* 0xe9 at place 13"),
    ],
)
def test_text_that_is_not_utf8(tmp_path, name, text, place):
    (tmp_path / name).write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=f"{name}, {place}".replace(".*", ": expected UTF-8 .*")):
        read_pairs(tmp_path / name, plain_tokenizer())


def test_utf16_is_not_utf8(tmp_path):
    (tmp_path / "rows.csv").write_bytes("prompt,chosen,rejected\nq,a,b\n".encode("utf-16"))
    assert "rows.csv, line 1: expected UTF-8 text, got the byte 0xff" in refusal(
        tmp_path / "rows.csv"
    )


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("null", "rows.jsonl, line 2: expected a JSON object of columns, got null"),
        ("[1]", "rows.jsonl, line 2: expected a JSON object of columns, got [1]"),
        ('"text"', "rows.jsonl, line 2: expected a JSON object of columns, got 'text'"),
        ("7", "rows.jsonl, line 2: expected a JSON object of columns, got 7"),
        ('{"prompt": "q', "rows.jsonl, line 2: expected a JSON object on each line, or one list"),
        ("{'prompt': 'q'}", "got Expecting property name enclosed in double quotes at place 2"),
        ("[" * 100_000, "rows.jsonl, line 2: expected a JSON object on each line"),
    ],
)
def test_a_line_that_is_no_object(tmp_path, line, got):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}\n")
    message = refusal(tmp_path / "rows.jsonl")
    assert got in message and len(message) < 400


def test_an_item_of_a_list_that_is_no_object(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([ROW, None]))
    assert "rows.json, item 2: expected a JSON object of columns, got null" in refusal(
        tmp_path / "rows.json"
    )
    (tmp_path / "rows.json").write_text('[{"prompt": "q"},')
    assert "rows.json: expected a JSON list of objects" in refusal(tmp_path / "rows.json")


def test_blank_lines_and_a_list_behind_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"\n  \n{json.dumps(ROW)}\n\n{json.dumps(ROW)}")
    assert len(read_pairs(tmp_path / "rows.jsonl", plain_tokenizer())) == 2
    (tmp_path / "rows.json").write_text(f"\n \n[{json.dumps(ROW)}]")
    assert len(read_pairs(tmp_path / "rows.json", plain_tokenizer())) == 1


def test_half_of_a_character_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        f"{json.dumps(ROW)}\n" + r'{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}'
    )
    assert refusal(tmp_path / "rows.jsonl") == (
        r"pair 1: expected text, got half of a character, '\ud83d'"
    )


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("prompt,chosen,rejected\nq,a\n", "line 2: expected 3 cells, one for each column, got 2"),
        ("prompt,chosen,rejected\nq,a,b\n\nq,a,b,c\n", "line 4: expected 3 cells.*got 4"),
        ('prompt,chosen,rejected\nq,a,"b\n', "line 2: expected CSV, got: unexpected end of data"),
        ("prompt,prompt,rejected\nq,a,b\n", "expected each column once, got prompt twice"),
        ("prompt;chosen;rejected\nq;a;b\n", "got the columns prompt;chosen;rejected"),
    ],
)
def test_a_csv_that_does_not_fit(tmp_path, text, got):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match=got):
        read_pairs(tmp_path / "rows.csv", plain_tokenizer())


def test_cells_of_a_csv_are_texts_of_any_length(tmp_path):
    long = "word " * 40_000  # more than Python's reader takes by itself
    (tmp_path / "rows.csv").write_text(f'prompt,chosen,rejected\nq,"{long}\n2, ""42""",None\n')
    (row,) = load_rows(tmp_path / "rows.csv")
    assert row == {"prompt": "q", "chosen": f'{long}\n2, "42"', "rejected": "None"}


# --- what trainers are given ---------------------------------------------------------------------


class MapStyle:
    """A data set as torch has them."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROW | {"id": f"m{index}"}


@pytest.mark.parametrize("kind", ["dict", "list", "generator", "stream", "torch", "map-style"])
def test_rows_in_memory(kind):
    rows = [ROW | {"id": f"m{i}"} for i in range(2)]
    source = {
        "list": rows,
        "generator": (row for row in rows),
        "stream": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "torch": datasets.Dataset.from_list(rows).with_format("torch"),
        "map-style": MapStyle(),
        "dict": datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list([ROW])}
        ),
    }[kind]
    assert is_rows(source) == (kind not in ("generator", "dict"))
    data = read_pairs(source, plain_tokenizer())
    assert [pair.id for pair in data.pairs] == ["m0", "m1"]
    assert data.report.source == "the data set"


def test_a_stream_is_read_as_far_as_it_is_asked_for():
    def endless():
        while True:
            yield ROW

    data = read_pairs(datasets.IterableDataset.from_generator(endless), plain_tokenizer(), limit=3)
    assert len(data) == 3


def test_what_is_no_rows():
    pair = TokenPair(
        id="0", **dict.fromkeys(("prompt", "chosen", "rejected"), np.ones(1, np.int32))
    )
    assert not is_rows([pair]) and not is_rows(3) and not is_rows([])
    assert "pair 1: expected a dict of columns, got str" in refusal([ROW, "text"])
    assert "expected rows as a Dataset of the datasets library or a list of dicts, got int" in (
        refusal(3)
    )
    assert "expected a split out of test in the data set, got train" in refusal(
        datasets.DatasetDict({"test": datasets.Dataset.from_list([ROW])})
    )
