"""Templates of the day: the right training text of each, and the page that says what they do."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from template_table import BEGIN, END, PAGE, ROWS, TEMPLATES, outcome, table, template
from transformers.utils import chat_template_utils

from sepo.data.read.reasons import DroppedRow, DropReason, RowNote

NOTHING, REASONED = (), ("\nIt is long.\n", "\nIt is short.\n")
# template -> of a plain row: the prompt, what ends a response
PLAIN = {
    "qwen3": (
        "<|im_start|>user\nWhich river?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhich river?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
        "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWhich river?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\n",
        "<|eot_id|>",
    ),
    "gemma2": (
        "<bos><start_of_turn>user\nWhich river?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nWhich river?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral_v3": ("<s>[INST] Which river?[/INST] ", "</s>"),
    "mistral_tekken": ("<s>[INST]Which river?[/INST]", "</s>"),
    "deepseek_r1": (
        "<｜begin▁of▁sentence｜><｜User｜>Which river?<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_training_text_of_a_plain_row(name):
    prompt, end = PLAIN[name]
    notes = (RowNote.UNSEEN,) * (name == "deepseek_r1")  # at inference it begins to think
    expected = (prompt, "Le Rhin." + end, "No idea." + end, notes)
    assert outcome(name, "plain") == outcome(name, "parts") == expected


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("qwen3", "<|im_start|>system\nAnswer in French.<|im_end|>\n"),
        ("llama3", "<|start_header_id|>system<|end_header_id|>\n\nAnswer in French.<|eot_id|>"),
        ("llama3.1", "Today Date: 26 Jul 2024\n\nAnswer in French.<|eot_id|>"),
        ("gemma3", "<start_of_turn>user\nAnswer in French.\n\nWhich river?<end_of_turn>\n"),
        ("gpt_oss", "<|start|>developer<|message|># Instructions\n\nAnswer in French.\n\n<|end|>"),
        ("smollm3", "## Custom Instructions\n\nAnswer in French.\n\n<|im_end|>\n"),
    ],
)
def test_a_system_turn_is_in_the_prompt(name, system):
    prompt, *_, notes = outcome(name, "system")
    assert system in prompt and notes == NOTHING


@pytest.mark.parametrize("name", ["mistral_v3", "mistral_tekken"])
def test_a_system_turn_that_inference_alone_would_see(name):
    prompt, chosen, _, notes = outcome(name, "system")
    assert prompt == PLAIN[name][0] and chosen == "Le Rhin.</s>"
    assert notes == (RowNote.UNSEEN, RowNote.LOST_PROMPT)


def test_a_system_turn_that_is_refused():
    assert outcome("gemma2", "system") == DroppedRow("0", DropReason.REFUSED, "no system turn")


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_in_the_content(name):
    _, *responses, notes = outcome(name, "reasoning")
    is_cut = name == "deepseek_r1"
    assert (RowNote.LOST_RESPONSE in notes) == is_cut
    for response, thought in zip(responses, REASONED, strict=True):
        assert response.startswith("\n\n" if is_cut else f"<think>{thought}</think>\n\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_in_a_field_of_its_own(name):
    _, chosen, _, notes = outcome(name, "reasoning_content")
    expected = {
        "qwen3": "<think>\nIt is long.\n</think>\n\nLe Rhin.<|im_end|>",
        "gpt_oss": "<|channel|>analysis<|message|>It is long.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Le Rhin.<|return|>",
    }
    if name in expected:
        assert chosen == expected[name] and notes == NOTHING
    else:
        assert chosen.startswith("Le Rhin.") and RowNote.LOST_RESPONSE in notes


def test_reasoning_reaches_a_template_that_reads_the_other_name(monkeypatch):
    """The first transformers that are declared hand messages over as they are."""
    as_it_is = lambda chat: chat
    monkeypatch.setattr(chat_template_utils, "_alias_reasoning_fields", as_it_is, raising=False)
    _, chosen, _, notes = outcome("gpt_oss", "reasoning_content")
    assert "<|message|>It is long.<|end|>" in chosen and notes == NOTHING


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_earlier_turn_may_lose_its_reasoning_as_it_does_at_inference(name):
    prompt, *_, notes = outcome(name, "earlier")
    assert ("It is short." in prompt) == (name not in ("qwen3", "deepseek_r1"))
    assert "The Rhine." in prompt and RowNote.LOST_PROMPT not in notes


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "qwen3",
            '<tool_call>\n{"name": "look_up", "arguments": {"name": "Rhine"}}\n</tool_call>'
            "<|im_end|>",
        ),
        ("llama3.1", '{"name": "look_up", "parameters": {"name": "Rhine"}}<|eot_id|>'),
        (
            "mistral_v3",
            '[TOOL_CALLS] [{"name": "look_up", "arguments": {"name": "Rhine"}, "id": "abcdefghi"}]'
            "</s>",
        ),
        (
            "gpt_oss",
            ' to=functions.look_up<|channel|>commentary json<|message|>{"name": "Rhine"}<|call|>',
        ),
    ],
)
def test_a_call_of_a_tool_is_the_response(name, call):
    prompt, chosen, rejected, notes = outcome(name, "call")
    assert (chosen, notes) == (call, NOTHING) and "look_up" in prompt
    assert rejected.endswith(outcome(name, "plain")[2])


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3", "smollm3"])
def test_tools_that_a_template_does_not_know(name):
    prompt, *_, notes = outcome(name, "tools")
    assert "look_up" not in prompt and notes == (RowNote.LOST_PROMPT,)
    assert outcome(name, "call").why is DropReason.EMPTY  # of a call nothing is left


def test_the_page_is_as_the_script_writes_it():
    found = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert found.strip() == table(), "python tests/helpers/template_table.py writes it"


TRLS = {  # template -> the file in which TRL carries the model's own
    "qwen3": "qwen3",
    "llama3": "llama3",
    "llama3.1": "llama3_1",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "deepseek_r1": "deepseek_r1_distill",
    "gpt_oss": "gptoss",
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", TRLS)
def test_they_do_what_the_models_own_do(name, kind):
    trl = find_spec("trl")
    file = trl and Path(trl.origin).parent / "chat_templates" / f"{TRLS[name]}.jinja"
    if not file or not file.exists():
        pytest.skip("no TRL with this template")
    own = file.read_text(encoding="utf-8")
    assert own.strip() != template(name).strip()
    expected, found = outcome(name, kind, own), outcome(name, kind)
    if isinstance(expected, DroppedRow):
        assert (expected.why, expected.id) == (found.why, found.id)
    else:
        assert found == expected
