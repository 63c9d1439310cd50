"""The whole text of a pair's two sides, and where in it each response is."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from sepo.data.formats import Drop, Preference, Why
from sepo.errors import InputError


@dataclass(frozen=True, slots=True)
class Span:
    """One side's whole text; the response is text[start:end], its end-of-turn token comes after."""

    text: str
    start: int
    end: int
    is_chat: bool


def spans(
    preference: Preference,  # messages or strings
    tokenizer: Any,  # of transformers, with a chat template for messages
) -> tuple[Span, Span] | Drop:
    """The whole text of the chosen and of the rejected side, or why there is none.

    Messages are rendered by the chat template, prompt and response in one; plain text is the
    prompt, which the template may have rendered, followed by the response. Raises InputError for
    messages without a chat template.
    """
    if preference.chosen == preference.rejected:
        return Drop(preference.id, Why.SAME)
    if isinstance(preference.prompt, str):
        return _plain_spans(preference.prompt, preference)
    if tokenizer.chat_template is None:
        raise InputError(
            f"row {preference.id}: expected a tokenizer with a chat template for messages, got "
            f"{tokenizer.name_or_path or type(tokenizer).__name__} without one; use an instruct "
            "model's tokenizer or plain strings"
        )
    return _chat_spans(preference, tokenizer)


def _plain_spans(prompt: str, p: Preference) -> tuple[Span, Span]:
    chosen, rejected = (
        Span(prompt + response, len(prompt), len(prompt + response), is_chat=False)
        for response in (p.chosen, p.rejected)
    )
    return chosen, rejected


def _chat_spans(p: Preference, tokenizer: Any) -> tuple[Span, Span] | Drop:
    from jinja2 import TemplateError

    render = partial(tokenizer.apply_chat_template, tools=p.tools, tokenize=False)
    try:
        if isinstance(p.chosen, str):
            return _plain_spans(render(p.prompt, add_generation_prompt=True), p)
        frame = _frame(p.prompt, render)
        sides = [
            _locate(render([*p.prompt, answer]), frame, p.prompt, render)
            for answer in (p.chosen, p.rejected)
        ]
    # TypeError: a template that adds a string to content that is None
    except (TemplateError, TypeError) as error:
        return Drop(p.id, Why.REFUSED, str(error).split("\n")[0])
    if None in sides:
        return Drop(p.id, Why.REWRITTEN)
    if any(span.start == span.end for span in sides):
        return Drop(p.id, Why.EMPTY, "nothing is left of it in the chat template")
    return tuple(sides)


def _frame(prompt: list[dict], render) -> tuple[str, str] | None:
    """What the template writes before and after the content of a last assistant message.

    Learned from a message that cannot be confused with anything, so that it holds whatever the
    template does to the content itself (trims it, puts reasoning before it).
    """
    stand_in = "sepo0response"
    while stand_in in str(prompt):
        stand_in += "0"
    before, found, after = render([*prompt, {"role": "assistant", "content": stand_in}]).partition(
        stand_in
    )
    return (before, after) if found else None


def _locate(text: str, frame: tuple[str, str] | None, prompt: list[dict], render) -> Span | None:
    if frame is None:
        return None
    before, after = frame
    if not text.endswith(after):  # so too if the template shows the content a second time
        return None
    if not text.startswith(before):
        # a template that writes reasoning where a plain answer has an empty block: fall back on
        # the text after which the model itself begins to write
        before = render(prompt, add_generation_prompt=True)
        if not text.startswith(before) or before == render(prompt):
            return None
    end = len(text) - len(after)
    return Span(text, len(before), end, is_chat=True) if len(before) <= end else None
