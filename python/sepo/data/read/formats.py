"""Rows of any known format as one small value: a prompt and the two responses to it.

A format is known by its columns. Conversations stay messages here; the chat template is applied
in `sepo.data.read.tokenise`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sepo.data.read import cells
from sepo.data.read import sepo_csv as official
from sepo.data.read.reasons import DroppedRow, DropReason
from sepo.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """A row that is tokenised."""

    id: str
    prompt: np.ndarray  # (T0,) int32
    chosen: np.ndarray  # (T1,) int32
    rejected: np.ndarray  # (T2,) int32
    chosen_weight: np.ndarray | None = None  # (T1,) float32 >= 0
    rejected_weight: np.ndarray | None = None  # (T2,) float32 >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainText:
    """A row of strings; each response follows the prompt as it is."""

    id: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """A row of conversations, for a chat template."""

    id: str
    prompt: list[dict]
    chosen: dict  # one assistant message
    rejected: dict
    tools: list | None = None  # what the chat template calls tools
    template_kwargs: dict | None = None  # what else the row tells the template


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A row of SePO's released code: two strings that follow the generation prompt."""

    id: str
    prompt: list[dict]  # one message
    chosen: str
    rejected: str
    selected: tuple[official.Selected, official.Selected]  # of chosen and rejected


TextRow = PlainText | Messages | Released
Preference = TokenIds | TextRow  # one row before tokenising


@dataclass(frozen=True, slots=True)
class Format:
    """Say what a set of columns means."""

    name: str
    columns: tuple[str, ...]  # the columns it is known by
    read: Callable[[dict, str], Preference | DroppedRow]  # (row, id) -> value
    serves: frozenset[str]  # columns that it reads beside those, if they are filled


def find_format(
    columns: Sequence[str],
    *,
    fields: Mapping[str, str] | None = None,  # field of the format -> the data's column name
) -> Format:
    """The format that these columns belong to.

    Raises InputError, naming the columns found and those expected, if there is none, if `fields`
    names a column that is not there, or if a mask or weights come without token ids.
    """
    fields = dict(fields or {})
    found = ", ".join(columns)
    unknown = sorted(fields.keys() - FIELDS)
    if unknown:
        raise InputError(f"expected fields out of {', '.join(sorted(FIELDS))}; got {unknown[0]}")
    absent = [column for column in fields.values() if column not in columns]
    if absent:
        raise InputError(f"expected a column {absent[0]}, got the columns {found}")
    names = (set(columns) - set(fields.values())) | set(fields)
    for form in FORMATS:
        if names.issuperset(form.columns):
            break
    else:
        expected = "; ".join(f"{', '.join(form.columns)} ({form.name})" for form in FORMATS)
        raise InputError(f"expected the columns of one of: {expected}; got the columns {found}")
    weights = sorted(names & WEIGHTS)
    if weights and form.read is not _read_ids:
        # the number of tokens of a text is the tokenizer's business, so nobody could have aligned
        # a mask with it
        raise InputError(
            f"expected {weights[0]} to come with prompt_ids, chosen_ids and rejected_ids (token "
            f"ids); got it with {', '.join(form.columns)}: a mask cannot be aligned with text"
        )
    return form


def read_row(
    row: Mapping[str, Any],
    number: int,  # of the row in its file, counted from 0
    form: Format,
    *,
    fields: Mapping[str, str] | None = None,
) -> Preference | DroppedRow:
    """One row as a Preference, or why it cannot be one.

    The id is the column `id` if it is there and filled, else the row's number. Raises InputError
    naming row and field for a value of the wrong type; null and blank responses are drops, and so
    is what has a meaning in some format and would be left out here.
    """
    fields = fields or {}
    moved = {field: row.get(column) for field, column in fields.items()}
    row = {name: cell for name, cell in row.items() if name not in fields.values()} | moved
    own = row.get("id")
    pair_id = str(number) if own is None or own == "" else str(own)
    for name in CONVERSATIONS & row.keys():
        row[name] = cells.unquoted(row[name], pair_id, name)
    one = form.read(row, pair_id)
    if isinstance(one, DroppedRow):
        return one
    # no template writes plain text, so nothing beside it reaches the model
    served = PLAIN if isinstance(one, PlainText) else form.serves
    for column in BESIDE:
        if column in row and column not in served and cells.is_filled(row[column]):
            return DroppedRow(one.id, DropReason.UNSERVED, f"{column}, beside {_written(one)}")
    if isinstance(one, Messages) and (media := _media(one)):
        return DroppedRow(one.id, DropReason.UNSERVED, f"{media}, as part of a message")
    return one


def _written(one: Preference) -> str:
    if isinstance(one, TokenIds):
        return "token ids"
    return "plain text" if isinstance(one, PlainText) else "messages"


def _media(one: Messages) -> str | None:
    """The kind of a part of a message that is no text: a picture, a sound."""
    for message in (*one.prompt, one.chosen, one.rejected):
        if isinstance(message.get("content"), list):
            for part in message["content"]:
                kind = part.get("type") if isinstance(part, dict) else None
                if isinstance(kind, str) and not MEDIA.isdisjoint(kind.split("_")):
                    return kind
    return None


# --- one reader for each format ------------------------------------------------------------------

SIDES = ("chosen", "rejected")
CONVERSATIONS = {"prompt", "conversations", *SIDES}
WEIGHTS = {f"{side}_{kind}" for side in SIDES for kind in ("mask", "weights")}
MEDIA = {f"{kind}{s}" for kind in ("image", "video", "audio") for s in ("", "s")}
CHAT = frozenset({"system", "tools", "chat_template_kwargs"})
PLAIN: frozenset[str] = frozenset()
# what has a meaning in some format, and no row may lose in silence
BESIDE = (
    *sorted(MEDIA),
    *sorted(CHAT),
    "history",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
TRANSCRIPT_MARK = "\n\nAssistant:"


def _read_ids(row: dict, pair_id: str) -> Preference | DroppedRow:
    """prompt_ids, chosen_ids, rejected_ids, each side with a mask or weights if the user has any."""
    ids = {
        name: cells.token_ids(row[f"{name}_ids"], pair_id, f"{name}_ids")
        for name in ("prompt", *SIDES)
    }
    if any(len(ids[side]) == 0 for side in SIDES):
        return DroppedRow(pair_id, DropReason.EMPTY)
    if len(ids["prompt"]) == 0:
        return DroppedRow(pair_id, DropReason.NO_PROMPT)
    weights = {side: cells.weight(row, pair_id, side, len(ids[side])) for side in SIDES}
    if any(weight is not None and not weight.any() for weight in weights.values()):
        return DroppedRow(pair_id, DropReason.ZERO_WEIGHT)
    return TokenIds(
        id=pair_id,
        prompt=ids["prompt"],
        chosen=ids["chosen"],
        rejected=ids["rejected"],
        chosen_weight=weights["chosen"],
        rejected_weight=weights["rejected"],
    )


def _read_sharegpt(row: dict, pair_id: str) -> Preference | DroppedRow:
    """conversations [{from, value}], chosen and rejected {from, value}; system, tools if present."""
    turns = cells.messages(row["conversations"], pair_id, "conversations")
    return _conversations(row, pair_id, _with_system(row, pair_id, turns))


def _read_question(row: dict, pair_id: str) -> Preference | DroppedRow:
    """system, history, question (or instruction and input), chosen, rejected: one turn each."""
    field = next(name for name in ("question", "instruction", "input") if name in row)
    question = cells.string(row[field], pair_id, field)
    if field == "instruction" and (extra := cells.string(row.get("input"), pair_id, "input")):
        question = f"{question}\n{extra}"
    if not question.strip():
        return DroppedRow(pair_id, DropReason.NO_PROMPT)
    asked = [*cells.history(row, pair_id), {"role": "user", "content": question}]
    return _conversations(row, pair_id, cells.system_turn(row, pair_id) + asked)


def _read_preference(row: dict, pair_id: str) -> Preference | DroppedRow:
    """prompt, chosen, rejected: strings, message lists, or a string and whole conversations."""
    prompt = row["prompt"]
    if isinstance(prompt, list | dict):
        turns = cells.messages(prompt, pair_id, "prompt")
        return _conversations(row, pair_id, _with_system(row, pair_id, turns))
    prompt = cells.string(prompt, pair_id, "prompt")
    # strings stay plain text, unless something beside them has a role
    if "system" in row or any(isinstance(row[side], list | dict) for side in SIDES):
        turns = [{"role": "user", "content": prompt}] if prompt.strip() else []
        return _conversations(row, pair_id, cells.system_turn(row, pair_id) + turns)
    chosen, rejected = (cells.string(row[side], pair_id, side) for side in SIDES)
    return _texts(pair_id, prompt, chosen, rejected)


def _read_implicit(row: dict, pair_id: str) -> Preference | DroppedRow:
    """chosen and rejected hold the prompt too: as messages, or as hh-rlhf's transcripts."""
    if any(isinstance(row[side], list | dict) for side in SIDES):
        return _conversations(row, pair_id, cells.system_turn(row, pair_id))
    parts = []
    for side in SIDES:
        text = cells.string(row[side], pair_id, side)
        if not text.strip():
            return DroppedRow(pair_id, DropReason.EMPTY)
        # the last mark: the earlier ones are turns of the prompt. Where two responses begin alike,
        # their common prefix reaches into both, so it says nothing about the prompt.
        head, mark, response = text.rpartition(TRANSCRIPT_MARK)
        if not mark:
            raise InputError(
                f"pair {pair_id}: expected {side}, without a prompt column, to be a list of messages "
                f"or a transcript with {TRANSCRIPT_MARK!r}, got {cells.short(text)}; add a column "
                "prompt"
            )
        parts.append((head + mark, response))
    (prompt, chosen), (other, rejected) = parts
    return (
        DroppedRow(pair_id, DropReason.PROMPTS_DIFFER)
        if prompt != other
        else _texts(pair_id, prompt, chosen, rejected)
    )


def _read_official(row: dict, pair_id: str) -> Preference | DroppedRow:
    """The CSV of SePO's released code: a user's message, two texts with their end tokens, indices."""
    fields = ("prompt", *(f"{side}_response" for side in SIDES))
    prompt, chosen, rejected = (official.read_text(row[field], pair_id, field) for field in fields)
    if not prompt.strip():
        return DroppedRow(pair_id, DropReason.NO_PROMPT)
    if not chosen.strip() or not rejected.strip():
        return DroppedRow(pair_id, DropReason.EMPTY)
    high, low = (official.read_selected(row, pair_id, side) for side in SIDES)
    if len(high.before) == 0 or len(low.before) == 0:
        return DroppedRow(pair_id, DropReason.ZERO_WEIGHT)
    return Released(
        id=pair_id,
        prompt=[{"role": "user", "content": prompt}],
        chosen=chosen,
        rejected=rejected,
        selected=(high, low),
    )


ASKED = CHAT | {"history"}
FORMATS = (
    Format("token ids", ("prompt_ids", "chosen_ids", "rejected_ids"), _read_ids, PLAIN),
    Format("ShareGPT ranking", ("conversations", "chosen", "rejected"), _read_sharegpt, CHAT),
    Format(
        "TRL, OpenRLHF, UltraFeedback", ("prompt", "chosen", "rejected"), _read_preference, CHAT
    ),
    Format("Orca", ("question", "chosen", "rejected"), _read_question, ASKED),
    Format("Alpaca ranking", ("instruction", "chosen", "rejected"), _read_question, ASKED),
    Format("Orca", ("input", "chosen", "rejected"), _read_question, ASKED),
    Format("messages, or hh-rlhf transcripts", ("chosen", "rejected"), _read_implicit, CHAT),
    Format("SePO's released code", official.COLUMNS, _read_official, PLAIN),
)
FIELDS = {name for form in FORMATS for name in form.columns} | WEIGHTS | CHAT | {"id", "history"}


# --- what the readers share ----------------------------------------------------------------------


def _texts(pair_id: str, prompt: str, chosen: str, rejected: str) -> PlainText | DroppedRow:
    if not chosen.strip() or not rejected.strip():
        return DroppedRow(pair_id, DropReason.EMPTY)
    return PlainText(id=pair_id, prompt=prompt, chosen=chosen, rejected=rejected)


def _conversations(row: dict, pair_id: str, shared: list[dict]) -> Preference | DroppedRow:
    """The turns that both sides share are the prompt; each response is one assistant message."""
    whole = []
    for side in SIDES:
        turns = row[side]
        if isinstance(turns, str) or turns is None:
            turns = [{"role": "assistant", "content": turns}]
        turns = cells.messages(turns, pair_id, side)
        if not turns:
            return DroppedRow(pair_id, DropReason.EMPTY)
        repeats = bool(shared) and _is_among(shared, turns[:-1])  # the side repeats the prompt
        if turns[0]["role"] in ("system", "user"):
            if turns[0]["role"] == "user":
                turns = _with_system(row, pair_id, turns)
            if not repeats and not _is_among(shared, turns):
                return DroppedRow(pair_id, DropReason.PROMPT_ELSEWHERE)
        elif not repeats:
            turns = shared + turns
        whole.append(turns)
    for turns in whole:
        if turns[-1]["role"] != "assistant":
            return DroppedRow(pair_id, DropReason.LAST_ROLE, f"got {turns[-1]['role']}")
        if _is_blank(turns[-1]):
            return DroppedRow(pair_id, DropReason.EMPTY)
    chosen, rejected = whole
    if chosen[:-1] != rejected[:-1]:
        return DroppedRow(pair_id, DropReason.PROMPTS_DIFFER)
    if not chosen[:-1]:
        return DroppedRow(pair_id, DropReason.NO_PROMPT)
    return Messages(
        id=pair_id,
        prompt=chosen[:-1],
        chosen=chosen[-1],
        rejected=rejected[-1],
        tools=cells.tools(row, pair_id),
        template_kwargs=cells.template_kwargs(row, pair_id),
    )


def _with_system(row: dict, pair_id: str, turns: list[dict]) -> list[dict]:
    """The turns after what the column `system` says, once."""
    system = cells.system_turn(row, pair_id)
    is_there = bool(turns) and turns[0]["role"] == "system"
    return turns if is_there and _texts_of(turns[:1]) == _texts_of(system) else system + turns


def _is_among(shared: list[dict], turns: list[dict]) -> bool:
    """Whether every turn of the prompt column occurs in the conversation."""
    texts = _texts_of(turns)
    return all(text in texts for text in _texts_of(shared))


def _texts_of(turns: list[dict]) -> list[str]:
    return [str(turn.get("content")).strip() for turn in turns]


def _is_blank(message: dict) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    # a tool call is an answer without content
    rest = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
    return not rest and not (content or "").strip()
