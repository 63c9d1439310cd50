"""Why a row is dropped, and what a reader of the report should know of one that is kept."""

from dataclasses import dataclass
from enum import StrEnum


class DropReason(StrEnum):
    """Why a row was dropped."""

    EMPTY = "a response is empty"
    NO_PROMPT = "the prompt is empty"
    MERGED = "no token of the prompt is free of a response's text"
    PROMPTS_DIFFER = "the two responses have different prompts"
    PROMPT_ELSEWHERE = "the prompt column is not a turn of the conversation"
    LAST_ROLE = "the last message is not the assistant's"
    ZERO_WEIGHT = "the mask or weights select nothing"
    UNSERVED = "the row has something that cannot be trained on"
    REFUSED = "the chat template refuses the conversation"
    REWRITTEN = "the chat template does not show the response in one place"
    OFFSETS = "the tokenizer's offsets do not cover the text"
    NO_ROOM = "the prompt fills max_length"
    SAME = "the two responses are the same"
    OTHER_IDS = "its token ids are those of another tokenizer or chat template"
    SAME_CUT = "the two responses are the same once cut"


class RowNote(StrEnum):
    """Say what happened to a row that was kept."""

    UNSEEN = "the training text does not begin with the prompt as inference renders it"
    LOST_PROMPT = "the chat template leaves out or changes something of the prompt"
    LOST_RESPONSE = "the chat template leaves out or changes something of a response"
    REPEATS = "a response begins with the whole prompt"
    CUT_CHOSEN = "chosen cut at max_length"
    CUT_REJECTED = "rejected cut at max_length"
    PREFIX = "one response begins with the whole other"
    STRADDLE = "a token holds the end of the prompt and the start of a response"
    NO_END = "a response has no end-of-turn token"


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that cannot be used, and why."""

    id: str
    why: DropReason | RowNote  # a note where notes are not tolerated
    detail: str = ""
