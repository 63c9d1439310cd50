"""What each format of preference rows is read as."""

import json

import numpy as np
import pytest
from preference_rows import BAD, GOOD, SYSTEM, USER, check_messages, read

from sepo.data.read.formats import DroppedRow, DropReason, Preference
from sepo.errors import InputError

# --- every format --------------------------------------------------------------------------------


def test_trl_strings_stay_plain_text():
    p = read({"prompt": "Q: ", "chosen": "a", "rejected": "b"})
    assert (p.id, p.prompt, p.chosen, p.rejected) == ("7", "Q: ", "a", "b")


def test_trl_messages():
    check_messages(read({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}), [USER])


def test_trl_implicit_prompt_in_messages():
    turns = [SYSTEM, USER]
    check_messages(read({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}), turns)


def test_ultrafeedback_ignores_the_string_prompt_its_conversation_repeats():
    row = {"prompt": "Which river?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    check_messages(read(row), [USER])


def test_a_message_prompt_that_the_conversation_repeats_is_not_doubled():
    row = {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD]}
    check_messages(read(row | {"rejected": [SYSTEM, USER, BAD]}), [SYSTEM, USER])


def test_a_string_prompt_before_message_responses_is_a_user_turn():
    check_messages(read({"prompt": "Which river?", "chosen": [GOOD], "rejected": [BAD]}), [USER])


def test_a_blank_prompt_beside_whole_conversations_says_nothing():
    row = {"prompt": "", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    check_messages(read(row), [USER])


def test_hh_splits_at_the_last_assistant_mark():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: which river?\n\nAssistant:"
    # both begin alike: the common prefix would reach into the responses
    p = read({"chosen": start + " The Rhine.", "rejected": start + " The Rhone."})
    assert (p.prompt, p.chosen, p.rejected) == (start, " The Rhine.", " The Rhone.")


def test_hh_with_prompts_that_differ_is_a_drop():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}
    assert read(row) == DroppedRow("7", DropReason.PROMPTS_DIFFER)
    longer = row["chosen"] + "\n\nHuman: more\n\nAssistant: z"
    assert read({"chosen": row["chosen"], "rejected": longer}) == DroppedRow(
        "7", DropReason.PROMPTS_DIFFER
    )


@pytest.mark.parametrize("name", ["question", "input", "instruction"])
def test_orca(name):
    row = {"system": "Be brief.", name: "Which river?"}
    row |= {"chosen": GOOD["content"], "rejected": BAD["content"]}
    check_messages(read(row), [SYSTEM, USER])
    check_messages(read(row | {"system": None}), [USER])


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Which", "input": "river?", "chosen": "a", "rejected": "b"}
    assert read(row).prompt == [{"role": "user", "content": "Which\nriver?"}]


def test_a_system_column_makes_strings_a_conversation():
    row = {"prompt": "Which river?", "system": "Be brief."}
    row |= {"chosen": GOOD["content"], "rejected": BAD["content"]}
    check_messages(read(row), [SYSTEM, USER])


def test_sharegpt():
    names = ["system", "human", "function_call", "observation", "human"]
    row = {
        "conversations": [{"from": n, "value": str(i)} for i, n in enumerate(names)],
        "chosen": {"from": "gpt", "value": "The Rhine."},
        "rejected": {"from": "gpt", "value": "No idea."},
        "tools": '[{"name": "map"}]',
    }
    p = read(row)
    roles = ["system", "user", "assistant", "tool", "user"]
    check_messages(p, [{"role": r, "content": str(i)} for i, r in enumerate(roles)])
    assert p.tools == [{"name": "map"}]


def test_openrlhf_names_its_own_columns():
    row = {"context": "Q", "better": "a", "worse": "b", "prompt": 3}
    p = read(row, fields={"prompt": "context", "chosen": "better", "rejected": "worse"})
    assert (p.prompt, p.chosen, p.rejected) == ("Q", "a", "b")
    row = {"context_messages": [USER], "chosen": [GOOD], "rejected": [BAD]}
    check_messages(read(row, fields={"prompt": "context_messages"}), [USER])


def test_token_ids_with_mask_and_weights():
    row = {"id": "x", "prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    p = read(row | {"chosen_mask": [0, 1], "rejected_weights": [0.25]})
    assert p.id == "x" and p.prompt.dtype == np.int32 and p.prompt.tolist() == [1, 2]
    assert p.chosen_weight.tolist() == [0, 1] and p.chosen_weight.dtype == np.float32
    assert p.rejected_weight.tolist() == [0.25]
    assert read(row | {"chosen_mask": None}).chosen_weight is None


def test_token_ids_in_the_cells_of_a_csv():
    row = {"prompt_ids": "[1, 2]", "chosen_ids": "[3]", "rejected_ids": "[4, 5]"}
    p = read(row | {"chosen_mask": "[1]", "rejected_mask": ""})
    assert (p.prompt.tolist(), p.rejected.tolist()) == ([1, 2], [4, 5])
    assert p.chosen_weight.tolist() == [1] and p.rejected_weight is None


def test_messages_are_the_rows_own_with_their_nulls_and_in_their_order():
    call = {"content": None, "tool_calls": [{"x": None, "name": "map"}], "role": "assistant"}
    answer = {"role": "tool", "name": "map", "content": "Rhine"}
    p = read({"prompt": [USER, call, answer], "chosen": [GOOD], "rejected": [BAD]})
    assert [list(turn.items()) for turn in p.prompt[1:]] == [
        list(turn.items()) for turn in (call, answer)
    ]


@pytest.mark.parametrize("own, id", [("a", "a"), (12, "12"), (0, "0"), (None, "7"), ("", "7")])
def test_id_is_the_column_or_the_row_number(own, id):
    assert read({"id": own, "prompt": "Q", "chosen": "a", "rejected": "b"}).id == id


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [([USER], [GOOD], [BAD]), ("Which river?", [USER, GOOD], [USER, BAD])],
)
def test_messages_as_json_in_the_cells_of_a_csv(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    as_text = {k: v if isinstance(v, str) else json.dumps(v, indent=1) for k, v in row.items()}
    check_messages(read(as_text), [USER])
    check_messages(read({k: as_text[k] for k in row if k != "prompt" or len(chosen) == 1}), [USER])
    turns = [{"from": "human", "value": "Which river?"}]
    row = {
        "conversations": json.dumps(turns),
        "chosen": as_text["chosen"],
        "rejected": json.dumps([BAD]),
    }
    if len(chosen) == 1:
        check_messages(read(row), [USER])
    with pytest.raises(
        InputError, match="pair 7: expected chosen to be a string, messages, or .*Python"
    ):
        read(as_text | {"chosen": str(chosen)})


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "admin"}]',
        '[{"name": "x", "role": "y"}]',
        '[{"role": "x", "content": ',
        "[{'a': 1}]",
    ],
)
def test_a_response_that_is_json_of_another_kind_is_text(text):
    assert read({"prompt": "As JSON:", "chosen": text, "rejected": "b"}).chosen == text


# --- columns beside those of a format ------------------------------------------------------------

CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXT = {"prompt": "Which river?", "chosen": "a", "rejected": "b"}
TRANSCRIPT = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
ALPACA = {"instruction": "Which river?", "chosen": GOOD["content"], "rejected": BAD["content"]}


@pytest.mark.parametrize(
    "history",
    [[["Hello", "Hi."], ["A?", "B."]], '[["Hello", "Hi."], ["A?", "B."]]'],
)
@pytest.mark.parametrize("name", ["instruction", "question", "input"])
def test_history_is_earlier_turns(name, history):
    row = {name: "Which river?", "chosen": GOOD["content"], "rejected": BAD["content"]}
    earlier = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, ["Hello", "Hi.", "A?", "B."], strict=True)
    ]
    check_messages(read(row | {"history": history}), [*earlier, USER])
    check_messages(
        read(row | {"history": history, "system": "Be brief."}), [SYSTEM, *earlier, USER]
    )
    for empty in (None, [], "", "[]"):
        check_messages(read(row | {"history": empty}), [USER])


@pytest.mark.parametrize("pair", ["Hello", ["Hello"], ["Hello", 3], {"role": "user"}])
def test_history_of_another_form(pair):
    with pytest.raises(InputError, match="pair 7: expected history to hold pairs of strings.*got"):
        read(ALPACA | {"history": [pair]})


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_what_a_row_tells_its_template(kwargs):
    assert read(CHAT | {"chat_template_kwargs": kwargs}).template_kwargs == {
        "enable_thinking": False
    }
    assert read(CHAT | {"chat_template_kwargs": {}}).template_kwargs is None
    with pytest.raises(
        InputError, match="chat_template_kwargs to hold what .* reads, got tokenize"
    ):
        read(CHAT | {"chat_template_kwargs": {"tokenize": True}})
    with pytest.raises(InputError, match="chat_template_kwargs to be an object, got list"):
        read(CHAT | {"chat_template_kwargs": ["x"]})


@pytest.mark.parametrize(
    ("row", "column", "beside"),
    [
        (CHAT | {"images": ["a.png"]}, "images", "messages"),
        (CHAT | {"image": "a.png"}, "image", "messages"),
        (ALPACA | {"videos": ["a.mp4"]}, "videos", "messages"),
        (TEXT | {"audios": '["a.wav"]'}, "audios", "plain text"),
        (TEXT | {"tools": [{"name": "map"}]}, "tools", "plain text"),
        (TEXT | {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "plain text"),
        (TRANSCRIPT | {"system": "Be brief."}, "system", "plain text"),
        (CHAT | {"history": [["a", "b"]]}, "history", "messages"),
        (CHAT | {"ref_chosen_logps": -3.5}, "ref_chosen_logps", "messages"),
        (
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "system": "Be brief."},
            "system",
            "token ids",
        ),
    ],
)
def test_a_filled_column_that_would_be_lost_is_a_drop(row, column, beside):
    assert read(row) == DroppedRow("7", DropReason.UNSERVED, f"{column}, beside {beside}")
    for empty in (None, [], "", {}, "[]"):
        assert isinstance(read(row | {column: empty}), Preference)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video", "video": "a.mp4"},
    ],
)
def test_a_part_that_is_no_text_is_a_drop(part):
    turn = {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}
    expected = DroppedRow("7", DropReason.UNSERVED, f"{part['type']}, as part of a message")
    assert read(CHAT | {"prompt": [turn]}) == expected


def test_a_system_column_stands_before_whole_conversations_and_once():
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "Be brief."}
    check_messages(read(whole), [SYSTEM, USER])
    check_messages(read(whole | {"prompt": [USER]}), [SYSTEM, USER])
    row = {"conversations": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD, "system": "Be brief."}
    check_messages(read(row), [SYSTEM, USER])
    other = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD], "system": "Be long."}
    assert read(other).why is DropReason.PROMPT_ELSEWHERE


GREETING = {"role": "assistant", "content": "Welcome!"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([GREETING, USER], [GREETING, USER]),
        ([SYSTEM, GREETING, USER], [SYSTEM, GREETING, USER]),
        ("Which river?", [GREETING, USER]),
    ],
)
def test_a_side_that_repeats_the_prompt_from_the_assistants_turn_on(prompt, expected):
    row = {"prompt": prompt, "chosen": [*expected, GOOD], "rejected": [*expected, BAD]}
    check_messages(read(row), expected)
    # one side with the prompt, one without
    check_messages(read(row | {"rejected": [BAD]} | {"prompt": expected}), expected)


def test_an_answer_that_says_what_the_prompt_says_is_an_answer():
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant"} | USER | BAD]}
    check_messages(read(row), [USER])
    echo = {"role": "assistant", "content": USER["content"]}
    assert read({"prompt": [USER], "chosen": [GOOD], "rejected": [echo]}).rejected == echo


def test_a_tool_call_is_an_answer_without_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "map"}]}
    assert read({"prompt": [USER], "chosen": [call], "rejected": [BAD]}).chosen == call
