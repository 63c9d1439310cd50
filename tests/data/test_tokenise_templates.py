"""What a chat template makes of a row: compared with the row, with inference, and where it fails."""

import pytest
from tokenizers_for_tests import (
    CHATML,
    THINKING,
    chat,
    chatml_tokenizer,
    dropped,
    kept,
    one,
    plain,
    plain_tokenizer,
    turn,
    with_template,
)

from sepo.data.read.formats import DroppedRow, DropReason, Messages
from sepo.data.read.tokenise import RowNote

LAST_TURN = (  # the system text stands in the last turn, if that is the user's
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{{ s + '\n\n' if s and loop.last and m.role == 'user' else '' }}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
DATED = (  # the date at inference, another one in training
    "{{ '2026' if add_generation_prompt else '2024' }}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be kind to me."}


def with_system(*responses) -> Messages:
    row = chat(*responses)
    row.prompt.insert(0, SYSTEM)
    return row


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (LAST_TURN, with_system("zz", "yy"), {RowNote.UNSEEN, RowNote.LOST_PROMPT}),
        (LAST_TURN, chat("zz", "yy"), set()),
        (NO_SYSTEM, with_system("zz", "yy"), {RowNote.LOST_PROMPT}),
        (DATED, chat("zz", "yy"), {RowNote.UNSEEN}),
        (
            CUTS,
            chat("<think>a</think>zz", "<think>b</think>yy"),
            {RowNote.UNSEEN, RowNote.LOST_RESPONSE},
        ),
        (CUTS, chat("zz", "yy"), {RowNote.UNSEEN}),
        (THINKING, chat("<think>a</think>zz", "yy"), set()),
        (THINKING, chat("<think>\na\n</think>\n\nzz", "yy"), set()),
        (
            NO_SYSTEM,
            chat("zz", turn("yy") | {"reasoning_content": "hm hm"}),
            {RowNote.LOST_RESPONSE},
        ),
        (
            NO_SYSTEM,
            chat("zz", turn("yy") | {"tool_calls": [{"name": "map"}]}),
            {RowNote.LOST_RESPONSE},
        ),
        (NO_SYSTEM, chat("zz", "yy", tools=[{"function": {"name": "map"}}]), {RowNote.LOST_PROMPT}),
        (NO_SYSTEM.replace("m.content", "m.content | tojson"), chat('"é"\n', "yy"), set()),
    ],
)
def test_the_text_is_compared_with_the_row_and_with_inference(template, row, expected):
    result = one(row, chatml_tokenizer(template))
    fidelity = {RowNote.UNSEEN, RowNote.LOST_PROMPT, RowNote.LOST_RESPONSE}
    assert fidelity & set(result.notes) == expected
    strict = one(row, chatml_tokenizer(template), strict=True)
    if expected:
        assert isinstance(strict, DroppedRow) and strict.why in expected


def test_what_the_policy_learns_begins_where_inference_leaves_off():
    row = with_system("zz", "yy")
    tokenizer = chatml_tokenizer(NO_SYSTEM)
    pair, _ = kept(row, tokenizer)
    asked = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode([*pair.prompt, *pair.chosen]) == asked + "zz<|im_end|>"


def test_responses_that_the_template_makes_the_same():
    result = one(chat("<think>a</think>zz", "<think>b</think>zz"), chatml_tokenizer(CUTS))
    assert result == DroppedRow("7", DropReason.SAME, "the chat template leaves out what differs")


def test_strict_drops_what_would_be_noted():
    tokenizer = plain_tokenizer()
    row = plain("Tell", " a b c d", " b")
    assert kept(row, tokenizer, strict=True)[1] == ()
    assert dropped(row, tokenizer, max_length=4, strict=True) is RowNote.CUT_CHOSEN


PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there."}]
TRIMS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
TAKES_PARTS = (  # and knows no string
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}[{{ p.text }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "prompt", "chosen"),
    [
        (TRIMS, "<|im_start|>user\nHello there.<|im_end|>\n", "Hello there.<|im_end|>"),
        (TRIMS.replace("trim", "tojson"), '<|im_start|>user\n"Hello there."', '"<|im_end|>'),
        (CHATML, "<|im_start|>user\nHello there.<|im_end|>\n", "Hello there.<|im_end|>"),
        (
            TAKES_PARTS,
            "<|im_start|>user\n[Hello ][there.]<|im_end|>\n",
            "[Hello ][there.]<|im_end|>",
        ),
    ],
)
def test_content_in_parts_is_text_for_every_template(template, prompt, chosen):
    row = chat(turn("x") | {"content": PARTS}, turn("x") | {"content": PARTS[:1]})
    row.prompt[0]["content"] = PARTS
    tokenizer = chatml_tokenizer(template)
    pair, notes = kept(row, tokenizer)
    text = tokenizer.decode([*pair.prompt, *pair.chosen])
    assert prompt in text and text.endswith(chosen) and "'type'" not in text
    assert not {RowNote.LOST_PROMPT, RowNote.LOST_RESPONSE} & set(notes)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("{{ raise_exception('no such role\\nat all') }}", "no such role"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ 'a' * (messages | length) + 1 }}", "TypeError: can only concatenate str"),
        ("{{ range(10 ** 9) }}", "OverflowError: "),
        (
            "{{ messages | map(attribute='x') | join | int('x') | round('y') }}",
            "FilterArgumentError",
        ),
        ("{{ {}['a'].b }}", "'dict object' has no attribute 'a'"),
        ("{{ 'x'.encode('nothing') }}", "LookupError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_a_template_that_fails_is_a_drop_with_its_reason(program, reason):
    result = one(chat("zz", "yy"), with_template(chatml_tokenizer(), program))
    assert result.why is DropReason.REFUSED and "\n" not in result.detail
    assert reason in result.detail or reason == "FilterArgumentError"


def test_a_template_that_cannot_render_the_prompt_alone():
    template = NO_SYSTEM + "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    pair, notes = kept(chat("zz", "yy"), chatml_tokenizer(template))
    assert RowNote.UNSEEN in notes and chatml_tokenizer().decode(pair.chosen) == "zz<|im_end|>"


def test_what_a_row_tells_its_template_reaches_it():
    template = "{{ flag }}" + NO_SYSTEM
    pair, notes = kept(chat("zz", "yy", template_kwargs={"flag": "on"}), chatml_tokenizer(template))
    assert chatml_tokenizer().decode(pair.prompt).startswith("on<|im_start|>user")
    assert not {RowNote.UNSEEN, RowNote.LOST_PROMPT} & set(notes)
