"""Files of preference rows, and the line that refuses one."""

import json

import pytest
from tokenizers_for_tests import plain_tokenizer

from sepo.data.read.read import read_pairs
from sepo.errors import InputError

ROW = {"prompt": "Tell me:", "chosen": "a", "rejected": "b"}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path, **options) -> str:
    with pytest.raises(InputError) as error:
        read_pairs(path, plain_tokenizer(), **options)
    return str(error.value)
