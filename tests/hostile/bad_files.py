"""Bad inputs by table: data, stores and models whose files are not what they should be."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.bad_inputs import COMMANDS, READERS, STORES, TRAIN, Case


def file_cases() -> list[Case]:
    return [*data_files(), *stores(), *models()]


def data_files() -> Iterator[Case]:
    row = dict(prompt="w3 w4", chosen="w5 w6", rejected="w7")
    lines = lambda *rows: "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in {
        "empty.jsonl": "", "blank.jsonl": "\n\n", "text.jsonl": "hello\n", "half.jsonl": '{"a": ',
        "number.jsonl": "7\n", "list.jsonl": "[1]\n", "string.jsonl": '"a"\n',
        "empty.json": "", "number.json": "7", "half.json": "[{", "nothing.json": "[]",
        "empty.csv": "", "header.csv": "prompt,chosen,rejected\n", "text.parquet": "PAR1 not",
        "empty.parquet": "", "half.parquet": b"PAR1\x00\x00\x00\x00PAR1", "rows.txt": lines(row),
        "rows": lines(row), "binary.jsonl": b"\x00\xff\xfe", "binary.csv": b"\x00\xff\xfe\n\x00",
        "latin1.csv": "prompt,chosen,rejected\né,a,b\n".encode("latin-1"),
        "latin1.jsonl": '{"prompt": "é", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"),
        "no_rejected.jsonl": lines(dict(prompt="w3", chosen="w4")),
        "no_chosen.jsonl": lines(dict(prompt="w3", rejected="w4")),
        "other_columns.jsonl": lines(dict(question="w3", answer="w4")),
        "empty_object.jsonl": "{}\n", "nulls.jsonl": lines(dict.fromkeys(row)),
        "one_null.jsonl": lines({**row, "chosen": None}),
        "number_for_text.jsonl": lines({**row, "chosen": 7}),
        "object_for_text.jsonl": lines({**row, "chosen": {"a": 1}}),
        "true_for_text.jsonl": lines({**row, "chosen": True}),
        "numbers.jsonl": lines({**row, "chosen": [1.5, 2.5]}),
        "same.jsonl": lines({**row, "chosen": row["rejected"]}),
        "no_response.jsonl": lines({**row, "chosen": ""}),
        "turns_without_template.jsonl": lines(
            {k: [dict(role="user" if k == "prompt" else "assistant", content=v)]
             for k, v in row.items()}
        ),
        "turn_without_content.jsonl": lines({**row, "chosen": [dict(role="assistant")]}),
        "turn_without_role.jsonl": lines({**row, "chosen": [dict(content="w3")]}),
        "negative_ids.jsonl": lines(dict(prompt_input_ids=[3], chosen_input_ids=[-4],
                                         rejected_input_ids=[5])),
        "two_types.jsonl": lines(row, {**row, "chosen": [dict(role="assistant", content="w3")]}),
        "long_prompt.jsonl": lines({**row, "prompt": "w3 " * 2000}),
    }.items():  # fmt: skip
        data = content if isinstance(content, bytes) else content.encode()
        write = lambda home, tmp, name=name, data=data: (tmp / name).write_bytes(data)
        for command, argv in READERS.items():
            more = ("--max_length", "512") if "prompt.jsonl" in name else ()
            yield _at(f"{command} of {name}", (*argv, *more), f"TMP/{name}", write)
    write = lambda home, tmp: (tmp / "null.jsonl").write_text("null\n")
    for command, argv in READERS.items():
        case = _at(f"{command} of null.jsonl", argv, "TMP/null.jsonl", write)
        yield Case(case.id, case.argv, case.prepare, process=True)
        empty = lambda home, tmp: (tmp / "folder").mkdir()
        yield _at(f"{command} of an empty folder", argv, "TMP/folder", empty)


MISSING = object()


def stores() -> Iterator[Case]:
    wrong = {
        "format": (MISSING, None, "x", 99, -1, []),
        "tokenizer": (MISSING, None, 7, "x", []),
        "keep": (MISSING, None, 7, "x", ["x"], {}),
        "pairs": (MISSING, None, "x", -1, 0, 1.5, []),
        "pairs_per_part": (MISSING, None, "x", -1, 0, 1.5, []),
    }
    for key, values in wrong.items():
        for value in values:
            shown = "missing" if value is MISSING else json.dumps(value)
            change = lambda home, tmp, key=key, value=value: _manifest(home, tmp, key, value)
            for command, argv in STORES.items():
                yield _at(f"{command}, manifest's {key} {shown}", argv, "TMP/store", change)
    for text in ("", "{", "[]", "null", "7", '"x"', "\x00"):
        change = lambda home, tmp, text=text: _changed(home, tmp, "manifest.json", text.encode())
        for command, argv in STORES.items():
            yield _at(f"{command}, manifest is {text!r}", argv, "TMP/store", change)
    for command, argv in STORES.items():
        huge = lambda home, tmp: _manifest(home, tmp, "pairs", 10**9)
        case = _at(f"{command}, manifest's pairs 10**9", argv, "TMP/store", huge)
        yield Case(case.id, case.argv, case.prepare, process=True)
        for name, how in (
            ("empty", lambda data: b""), ("half", lambda data: data[: len(data) // 2]),
            ("text", lambda data: b"hello"), ("missing", lambda data: None),
            ("without its end", lambda data: data[:-4]),
        ):  # fmt: skip
            change = lambda home, tmp, how=how: _part(home, tmp, how)
            yield _at(f"{command}, part is {name}", argv, "TMP/store", change)


def models() -> Iterator[Case]:
    config = {
        "is empty": b"", "is half": b'{"model_type": ', "is a list": b"[]", "is null": b"null",
        "is binary": b"\x00\xff", "is of nothing": b"{}", "is of a stranger": b'{"model_type": "x"}',
        "is missing": None,
    }  # fmt: skip
    tensors = {
        "is empty": b"", "is half": -1, "is text": b"hello", "is missing": None,
        "has a header beyond its end": b"\xff" * 8 + b"{}", "has no header": b"\x00" * 64,
    }  # fmt: skip
    vocabulary = {"is empty": b"", "is half": -1, "is a list": b"[]", "is binary": b"\x00\xff"}
    for file, contents in (
        ("config.json", config),
        ("model.safetensors", tensors),
        ("tokenizer.json", vocabulary),
        ("tokenizer_config.json", {"is half": b"{", "is a list": b"[]", "is null": b"null"}),
    ):
        for name, content in contents.items():
            change = lambda home, tmp, file=file, content=content: _changed(
                home, tmp, file, content, what="model"
            )
            argv = {
                "train": (*TRAIN, "--model_name_or_path", "TMP/model"),
                "score": (*COMMANDS["score"], "--reference", "TMP/model"),
                "score's oracle": (*COMMANDS["score"], "--oracle", "TMP/model"),
                "dpo's reference": (
                    *(*TRAIN, "--method", "dpo", "--reference", "TMP/model"),
                    *("--dataset_name", "HOME/pairs.jsonl"),
                ),
            }
            for who, words in argv.items():
                if who != "dpo's reference" or "tokenizer" not in file:
                    yield Case(f"{who}: {file} {name}", words, change)


def _at(id: str, argv: tuple, place: str, prepare: Callable) -> Case:
    return Case(id, tuple(word.replace("DATA", place) for word in argv), prepare)


def _changed(
    home: Path, tmp: Path, file: str, content: bytes | int | None, *, what: str = "store"
) -> None:
    """A copy of HOME's with one file of other content; None: without it; -1: its first half."""
    shutil.copytree(home / what, tmp / what)
    path = tmp / what / file
    if content is None:
        return path.unlink()
    old = path.read_bytes()
    path.write_bytes(old[: len(old) // 2] if content == -1 else content)


def _manifest(home: Path, tmp: Path, key: str, value) -> None:
    manifest = json.loads((home / "store" / "manifest.json").read_text())
    del manifest[key]
    if value is not MISSING:
        manifest[key] = value
    _changed(home, tmp, "manifest.json", json.dumps(manifest).encode())


def _part(home: Path, tmp: Path, how: Callable) -> None:
    (part,) = (home / "store").glob("part-*.parquet")
    _changed(home, tmp, part.name, how(part.read_bytes()))
