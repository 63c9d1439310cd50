"""A key that an object has twice is refused wherever a row's JSON is read; none is dropped."""

import json

import pytest
from tokenizers_for_tests import plain_tokenizer

from sepo.data.read import strict_json
from sepo.data.read.read import read_pairs
from sepo.errors import InputError

TWICE = '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}'
MESSAGE = '{"role": "user", "content": "q", "content": "r"}'


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        read_pairs(path, plain_tokenizer())
    return str(caught.value)


def test_the_values_are_those_of_pythons_reader():
    text = '{"b": [1, 2.5, null, {"a": "\\u00e9", "A": true}], "a": {}}'
    assert strict_json.loads(text) == json.loads(text)
    assert list(strict_json.loads(text)) == ["b", "a"]


def test_a_column_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "q", "chosen": "a", "rejected": "b"}}\n{TWICE}\n')
    assert refusal(path).endswith("rows.jsonl, line 2: expected a JSON object on each line, or one "
                                  "list of them, got the key 'chosen' twice in one object")  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(f"[{TWICE}]")
    assert "got the key 'chosen' twice in one object" in refusal(path)


def test_a_key_of_a_message_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": [{MESSAGE}], "chosen": "a", "rejected": "b"}}\n')
    assert "got the key 'content' twice in one object" in refusal(path)


def test_a_key_twice_in_messages_that_a_cell_holds_as_text(tmp_path):
    path = tmp_path / "rows.csv"
    quoted = f"[{MESSAGE}]".replace('"', '""')
    path.write_text(f'prompt,chosen,rejected\n"{quoted}",a,b\n')
    assert refusal(path).endswith(
        "rows.csv: pair 0: expected prompt to be messages, got the key 'content' twice in one object"
    )
