"""The whole text of a pair's two sides, and where in it each response is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sepo.data.read import content
from sepo.data.read.formats import Messages, PlainText, Released, TextRow
from sepo.data.read.reasons import DroppedRow, DropReason, RowNote
from sepo.errors import InputError


@dataclass(frozen=True, slots=True)
class Span:
    """One side's whole text; the response is text[start:end], its end-of-turn token comes after."""

    text: str
    start: int
    end: int
    is_chat: bool
    notes: tuple[RowNote, ...] = ()  # what the text is not, that the row or inference says it is


def spans(
    preference: TextRow,
    tokenizer: Any,  # of transformers, with a chat template for messages
) -> tuple[Span, Span] | DroppedRow:
    """The whole text of the chosen and of the rejected side, or why there is none.

    Messages are rendered by the chat template, prompt and response in one; plain text is the
    prompt, which the template may have rendered, followed by the response. What the text lacks of
    the row, and whether it goes on from the prompt as inference renders it, is looked up for each
    side. Raises InputError for messages without a chat template.
    """
    if preference.chosen == preference.rejected:
        return DroppedRow(preference.id, DropReason.SAME)
    if isinstance(preference, PlainText):
        return _plain_spans(preference.prompt, preference)
    if tokenizer.chat_template is None:
        raise InputError(
            f"pair {preference.id}: expected a tokenizer with a chat template for messages, got "
            f"{tokenizer.name_or_path or type(tokenizer).__name__} without one; use an instruct "
            "model's tokenizer or plain strings"
        )
    try:
        if isinstance(preference, Released):
            return _released_spans(preference, partial(_render, tokenizer, None, {}))
        told = preference.template_kwargs or {}
        return _chat_spans(preference, partial(_render, tokenizer, preference.tools, told))
    except _Refused as refused:
        return DroppedRow(preference.id, DropReason.REFUSED, str(refused))


def _plain_spans(
    prompt: str, p: PlainText | Released, notes: tuple[RowNote, ...] = ()
) -> tuple[Span, Span]:
    notes += (RowNote.REPEATS,) * content.repeats_prompt(p)
    chosen, rejected = (
        Span(prompt + response, len(prompt), len(prompt + response), is_chat=False, notes=notes)
        for response in (p.chosen, p.rejected)
    )
    return chosen, rejected


# --- messages ------------------------------------------------------------------------------------

Render = Callable[..., str]


class _Refused(Exception):
    """The template can't write a conversation, in one line."""


def _render(
    tokenizer: Any, tools: list | None, told: dict, messages: list[dict], **how: Any
) -> str:
    from jinja2 import TemplateError

    try:
        messages = [content.with_reasoning(message) for message in messages]
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **told, **how)
    # a template is a program: it can fail in any way that Python can
    except Exception as error:
        reason = (str(error) or "without a reason").split("\n")[0]
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise _Refused(kind + reason) from error


def _released_spans(p: Released, render: Render) -> tuple[Span, Span]:
    opening = render(p.prompt, add_generation_prompt=True)
    return _plain_spans(opening, p, _lost_prompt(p.prompt, None, opening))


def _chat_spans(p: Messages, render: Render) -> tuple[Span, Span] | DroppedRow:
    p = _with_strings(p, render)
    texts = [render([*p.prompt, answer]) for answer in (p.chosen, p.rejected)]
    opening: str | None
    try:
        opening = render(p.prompt, add_generation_prompt=True)
    except _Refused:  # it writes the prompt before an answer only, so nobody can ask for one
        opening = None
    places = _directly_after(opening, p, texts)
    if places is None:
        frame = _frame(p, render)
        found = [
            _locate(text, answer, frame, opening, p.prompt, render)
            for text, answer in zip(texts, (p.chosen, p.rejected), strict=True)
        ]
        places = [place for place in found if place is not None]
    if len(places) < len(texts):
        return DroppedRow(p.id, DropReason.REWRITTEN)
    if any(start == end for start, end in places):
        return DroppedRow(p.id, DropReason.EMPTY, "nothing is left of it in the chat template")
    sides, repeats = [], (RowNote.REPEATS,) * content.repeats_prompt(p)
    for text, answer, (start, end) in zip(texts, (p.chosen, p.rejected), places, strict=True):
        notes = _lost_prompt(p.prompt, p.tools, text[:start])
        if opening is None or not text.startswith(opening):
            notes = (RowNote.UNSEEN, *notes)
        if not content.is_shown(answer, text[start:]):
            notes += (RowNote.LOST_RESPONSE,)
        sides.append(Span(text, start, end, is_chat=True, notes=notes + repeats))
    chosen, rejected = sides
    return chosen, rejected


def _lost_prompt(prompt: list[dict], tools: list | None, text: str) -> tuple[RowNote, ...]:
    whole = all(content.is_shown(turn, text, is_earlier=True) for turn in prompt)
    whole = whole and all(map(partial(content.shows, text), content.tool_names(tools)))
    return () if whole else (RowNote.LOST_PROMPT,)


def _with_strings(p: Messages, render: Render) -> Messages:
    """The row with a string for content that is in parts, if the template knows strings only."""
    answers = [p.chosen, p.rejected]
    if not any(isinstance(turn.get("content"), list) for turn in (*p.prompt, *answers)):
        return p
    try:
        texts = [render([*p.prompt, answer]) for answer in answers]
    except _Refused:
        texts = []
    if texts and all(
        content.shows_parts(turn, text)
        for text, answer in zip(texts, answers, strict=True)
        for turn in (*p.prompt, answer)
    ):
        return p
    return replace(
        p,
        prompt=[content.with_string(turn) for turn in p.prompt],
        chosen=content.with_string(p.chosen),
        rejected=content.with_string(p.rejected),
    )


def _directly_after(
    opening: str | None, p: Messages, texts: list[str]
) -> list[tuple[int, int]] | None:
    """Where the responses are, if both follow the prompt as they are and the same follows them."""
    places, rests = [], set()
    for text, answer in zip(texts, (p.chosen, p.rejected), strict=True):
        said = answer["content"] if answer.keys() == {"role", "content"} else None
        if not opening or not isinstance(said, str) or not said:
            return None
        if not text.startswith(opening) or not text.startswith(said, len(opening)):
            return None
        places.append((len(opening), len(opening) + len(said)))
        rests.add(text[places[-1][1] :])
    return places if len(rests) == 1 else None


def _frame(p: Messages, render: Render) -> tuple[str, str] | None:
    """Find what the template writes before and after the content of a last assistant message.

    Learned from a message that cannot be confused with anything, so that it holds whatever the
    template does to the content itself (trims it, puts reasoning before it).
    """
    stand_in = "sepo0response"
    while stand_in in str(p.prompt):
        stand_in += "0"
    in_parts = isinstance(p.chosen.get("content"), list)
    said = [{"type": "text", "text": stand_in}] if in_parts else stand_in
    before, found, after = render([*p.prompt, {"role": "assistant", "content": said}]).partition(
        stand_in
    )
    return (before, after) if found else None


def _locate(
    text: str,
    answer: dict,
    frame: tuple[str, str] | None,
    opening: str | None,
    prompt: list[dict],
    render: Render,
) -> tuple[int, int] | None:
    if frame is None:
        return None
    before, after = frame
    is_call = bool(answer.get("tool_calls"))
    if not text.endswith(after):  # so too if the template shows the content a second time
        if not is_call:
            return None
        after = ""  # a call may end in a token of its own
    if not text.startswith(before):
        # a template that writes reasoning where a plain answer has an empty block: fall back on
        # the text after which the model itself begins to write
        if opening is None or not text.startswith(opening):
            return None
        before = opening
        if before == render(prompt) and not is_call:  # it does not say where an answer begins
            return None
    end = len(text) - len(after)
    return (len(before), end) if len(before) <= end else None
