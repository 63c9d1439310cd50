"""Find what a message says, and whether a text says it too."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from sepo.data.read.formats import TextRow

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what is thought aloud
THOUGHT = "</think>"  # ends what templates cut from earlier turns, at inference too


def shows(text: str, part: str) -> bool:
    """Whether the text has this part of a message, up to white space and JSON's escapes."""
    part = part.strip()
    if part in text:
        return True
    if any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    return "".join(part.split()) in "".join(text.split())


def is_shown(message: dict | str, text: str, *, is_earlier: bool = False) -> bool:
    """Whether the text has all that the message says: its content, reasoning and calls of tools.

    An earlier turn may lose its reasoning: what the model reads of it at inference loses it too.
    """
    if isinstance(message, str):
        return shows(text, message)
    for said in _texts(message):
        if not shows(text, said):
            _, thought, answer = said.rpartition(THOUGHT)
            if not (is_earlier and thought and shows(text, answer)):
                return False
    found = partial(shows, text)
    if not is_earlier and not all(map(found, _reasoning(message))):
        return False
    return all(map(found, _calls(message.get("tool_calls"))))


def tool_names(tools: list | None) -> Iterator[str]:
    """Of the functions that the template is told of."""
    for tool in tools or ():
        tool = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            yield tool["name"]


def repeats_prompt(p: TextRow) -> bool:
    """Whether a response begins with all that is asked; short words do so by chance, unless both do."""
    prompt = p.prompt if isinstance(p.prompt, str) else "".join(_texts(p.prompt[-1]))
    if not (prompt := prompt.strip()):
        return False
    begins = [_whole(side).lstrip().startswith(prompt) for side in (p.chosen, p.rejected)]
    return all(begins) or (any(begins) and len(prompt.split()) > 2)


# --- content in parts ----------------------------------------------------------------------------


def shows_parts(message: dict, text: str) -> bool:
    """Whether the text has the parts' words, and not the list that they are in."""
    content = message.get("content")
    if not isinstance(content, list):
        return True
    printed = (str(content), json.dumps(content, ensure_ascii=False), json.dumps(content))
    return not any(p in text for p in printed) and all(shows(text, t) for t in _texts(message))


def with_string(message: dict) -> dict:
    """The message with its parts end to end, if they are all text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = list(_texts(message))
    return message | {"content": "".join(texts)} if len(texts) == len(content) else message


def with_reasoning(message: dict) -> dict:
    """The message with its reasoning under both names that templates read.

    Newer transformers do the same to each message, those of the lowest version that is declared do
    not: a row would be another text to a template that reads the other name (gpt-oss).
    """
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _text(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


# --- what is in a message ------------------------------------------------------------------------


def _whole(side: dict | str) -> str:
    return side if isinstance(side, str) else "".join(_texts(side))


def _texts(message: dict) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if (text := _text(part)) is not None:
            yield text


def _reasoning(message: dict) -> Iterator[str]:
    return (message[name] for name in REASONING if isinstance(message.get(name), str))


def _calls(calls: Any) -> Iterator[str]:
    """Names of the functions called, and each text among their arguments."""
    for call in calls if isinstance(calls, list) else ():
        call = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(call, dict):
            continue
        if isinstance(call.get("name"), str):
            yield call["name"]
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass
        yield from _leaves(arguments)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
