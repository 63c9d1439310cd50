"""Rows that a format drops with a reason, and those that it refuses in a line."""

import pytest
from preference_rows import BAD, GOOD, SYSTEM, USER, read

from sepo.data.read.formats import DroppedRow, DropReason, find_format
from sepo.errors import InputError

# --- drops ---------------------------------------------------------------------------------------

LONG = {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}
IDS = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}


@pytest.mark.parametrize(
    "row, why",
    [
        ({"prompt": "Q", "chosen": None, "rejected": "b"}, DropReason.EMPTY),
        ({"prompt": "Q", "chosen": "a", "rejected": " \n"}, DropReason.EMPTY),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, DropReason.EMPTY),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": None}]},
            DropReason.EMPTY,
        ),
        ({"chosen": "\n\nAssistant:", "rejected": "\n\nAssistant: b"}, DropReason.EMPTY),
        ({"chosen": None, "rejected": "\n\nAssistant: b"}, DropReason.EMPTY),
        ({"chosen": [GOOD], "rejected": [BAD]}, DropReason.NO_PROMPT),
        ({"question": " ", "chosen": "a", "rejected": "b"}, DropReason.NO_PROMPT),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, DropReason.PROMPTS_DIFFER),
        (LONG, DropReason.PROMPTS_DIFFER),
        (
            {"prompt": "Other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            DropReason.PROMPT_ELSEWHERE,
        ),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, DropReason.LAST_ROLE),
        (IDS | {"chosen_ids": []}, DropReason.EMPTY),
        (IDS | {"chosen_ids": None}, DropReason.EMPTY),
        (IDS | {"prompt_ids": []}, DropReason.NO_PROMPT),
        (IDS | {"chosen_mask": [0, 0]}, DropReason.ZERO_WEIGHT),
        (IDS | {"rejected_weights": [0.0]}, DropReason.ZERO_WEIGHT),
    ],
)
def test_drop(row, why):
    dropped = read(row)
    assert isinstance(dropped, DroppedRow) and (dropped.id, dropped.why) == ("7", why)


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "pair 7: expected chosen to be a string"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "pair 7: expected prompt to be a string"),
        (
            {"prompt": "Q", "chosen": ["a"], "rejected": ["b"]},
            "pair 7: expected chosen to hold mess",
        ),
        ({"chosen": "plain", "rejected": "text"}, r"pair 7: expected chosen, without a prompt col"),
        (
            {"prompt": [{"content": "x"}], "chosen": [GOOD], "rejected": [BAD]},
            "`from` out of human",
        ),
        (
            {"prompt": [USER | {"content": 3}], "chosen": [GOOD], "rejected": [BAD]},
            "in prompt to be",
        ),
        (
            {"conversations": [{"from": "bot", "value": "x"}], "chosen": [GOOD], "rejected": [BAD]},
            "pair 7: expected each message of conversations to have a role.*got 'bot'",
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "{"}, "tools to be JSON"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "{}x"}, "to be JSON"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": '{"a": 1}'}, "be a list"),
        (IDS | {"chosen_ids": "[1, "}, "pair 7: expected chosen_ids to be JSON"),
        (IDS | {"chosen_ids": 3}, "pair 7: expected chosen_ids to be a list of numbers, got int"),
        (IDS | {"chosen_ids": [1.5, 2]}, "pair 7: expected chosen_ids to be whole numbers"),
        (IDS | {"chosen_ids": [[1], [2, 3]]}, "pair 7: expected chosen_ids to be one flat list"),
        (IDS | {"chosen_ids": [-100, 3]}, "pair 7: expected chosen_ids to be token ids, got -100"),
        (IDS | {"chosen_mask": [1]}, "pair 7: expected chosen_mask to hold 2 numbers.*got 1"),
        (
            IDS | {"rejected_weights": [1, 1]},
            "pair 7: expected rejected_weights to hold 1 numb.*got 2",
        ),
        (IDS | {"chosen_mask": [1, 2]}, "chosen_mask to be 0 or 1 .*, got 2"),
        (IDS | {"chosen_mask": [0.5, 1]}, "chosen_mask to be 0 or 1 .*, got 0.5"),
        (IDS | {"rejected_mask": [-1]}, "rejected_mask to be finite and >= 0, got -1"),
        (
            IDS | {"chosen_weights": "[1, Infinity]"},
            "chosen_weights to be finite and >= 0, got inf",
        ),
        (IDS | {"chosen_weights": [1, None]}, "chosen_weights to hold 2 numbers.*None"),
        (IDS | {"chosen_weights": "1, 0"}, "chosen_weights to be JSON, got '1, 0'"),
        (IDS | {"chosen_weights": [1, -2]}, "chosen_weights to be finite and >= 0, got -2"),
        (
            IDS | {"chosen_weights": [1, float("nan")]},
            "chosen_weights to be finite and >= 0, got nan",
        ),
        (IDS | {"chosen_mask": [1, 1], "chosen_weights": [1, 1]}, "got both"),
    ],
)
def test_wrong_type_names_row_and_field(row, message):
    with pytest.raises(InputError, match=message):
        read(row)


def test_unknown_columns_name_what_was_found_and_expected():
    with pytest.raises(InputError, match="expected the columns of one of: prompt_ids.*got.*a, b"):
        find_format(["a", "b"])


def test_a_mask_needs_token_ids():
    with pytest.raises(InputError, match="expected chosen_mask to come with prompt_ids"):
        find_format(["prompt", "chosen", "rejected", "chosen_mask"])


def test_fields_are_checked():
    columns = ["prompt", "chosen", "rejected"]
    with pytest.raises(InputError, match="expected a column better, got the columns prompt"):
        find_format(columns, fields={"chosen": "better"})
    with pytest.raises(InputError, match="expected fields out of .*; got chosne"):
        find_format(columns, fields={"chosne": "chosen"})
