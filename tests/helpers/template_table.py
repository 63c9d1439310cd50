"""What chat templates of the day do to a row, and what `sepo inspect` says of it: docs/templates.md.

tests/templates has the templates, written anew from what their models' documentation and packages
show that they do. `python tests/helpers/template_table.py` writes the table into the page.
"""

from copy import deepcopy
from pathlib import Path

from tokenizers_for_tests import chatml_tokenizer

from sepo.data.read.formats import find_format, read_row
from sepo.data.read.reasons import DroppedRow, DropReason, RowNote
from sepo.data.read.render import spans
from sepo.data.read.tokenise import tokenise

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "templates.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"
# template -> how the page calls it, its bos and its special tokens
TEMPLATES = {
    "qwen3": ("Qwen3", "", "<|im_start|> <|im_end|>"),
    "llama3": ("Llama 3", "<|begin_of_text|>", "<|start_header_id|> <|end_header_id|> <|eot_id|>"),
    "llama3.1": (
        "Llama 3.1, 3.2",
        "<|begin_of_text|>",
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    ),
    "gemma2": ("Gemma, Gemma 2", "<bos>", "<start_of_turn> <end_of_turn>"),
    "gemma3": ("Gemma 3", "<bos>", "<start_of_turn> <end_of_turn>"),
    "mistral_v3": ("Mistral v3", "<s>", "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] </s>"),
    "mistral_tekken": (
        "Mistral v3 Tekken",
        "<s>",
        "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] </s>",
    ),
    "deepseek_r1": (
        "DeepSeek-R1",
        "<｜begin▁of▁sentence｜>",
        "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>",
    ),
    "gpt_oss": (
        "gpt-oss (harmony)",
        "",
        "<|start|> <|message|> <|channel|> <|end|> <|return|> <|call|>",
    ),
    "smollm3": ("SmolLM3", "", "<|im_start|> <|im_end|>"),
}
ENDS = {"mistral_v3": "</s>", "mistral_tekken": "</s>"}
SHORT = {
    RowNote.UNSEEN: "not as at inference",
    RowNote.LOST_PROMPT: "prompt changed",
    RowNote.LOST_RESPONSE: "response changed",
    DropReason.REFUSED: "dropped: refused",
    DropReason.REWRITTEN: "dropped: not in one place",
    DropReason.EMPTY: "dropped: empty",
    DropReason.SAME: "dropped: the same",
}


def template(name: str) -> str:
    """A template's text; Tekken's is the older one without its blanks."""
    file = "mistral_v3" if name == "mistral_tekken" else name
    text = (TESTS / "templates" / f"{file}.jinja").read_text(encoding="utf-8")
    return text.replace("set space = ' '", "set space = ''") if file != name else text


def tokenizer_of(name: str, text: str | None = None):
    """A small tokenizer with the template's tokens, and another template if one is given."""
    _, bos, special = TEMPLATES[name]
    tokenizer = deepcopy(chatml_tokenizer())
    tokens = special.split() + [bos] * bool(bos)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if bos:
        tokenizer.bos_token = bos
    if name in ENDS:
        tokenizer.eos_token = ENDS[name]
    tokenizer.chat_template = text or template(name)
    return tokenizer


# --- rows ----------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Which river?"}
SYSTEM = {"role": "system", "content": "Answer in French."}
THOUGHT, OTHER = "It is long.", "It is short."
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a river.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"name": "Rhine"}},
}


def answer(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def row(*prompt, chosen=None, rejected=None, **columns) -> dict:
    sides = {"chosen": [chosen or answer("Le Rhin.")], "rejected": [rejected or answer("No idea.")]}
    return {"prompt": list(prompt) or [USER], **sides, **columns}


ROWS = {
    "plain": row(),
    "turns": row(USER, answer("The Rhine."), USER),
    "system": row(SYSTEM, USER),
    "reasoning": row(
        chosen=answer(f"<think>\n{THOUGHT}\n</think>\n\nLe Rhin."),
        rejected=answer(f"<think>\n{OTHER}\n</think>\n\nNo idea."),
    ),
    "reasoning_content": row(
        chosen=answer("Le Rhin.", reasoning_content=THOUGHT),
        rejected=answer("No idea.", reasoning_content=OTHER),
    ),
    "earlier": row(USER, answer(f"<think>\n{OTHER}\n</think>\n\nThe Rhine."), USER),
    "tools": row(tools=[TOOL]),
    "call": row(chosen={"role": "assistant", "tool_calls": [CALL]}, tools=[TOOL]),
    "parts": row(
        {"role": "user", "content": [{"type": "text", "text": "Which river?"}]},
        chosen=answer([{"type": "text", "text": "Le Rhin."}]),
    ),
}


def outcome(name: str, kind: str, text: str | None = None):
    """What becomes of a row: the pair as text and its notes, or why it is dropped."""
    tokenizer = tokenizer_of(name, text)
    one = read_row(ROWS[kind], 0, find_format(list(ROWS[kind])))
    (done,) = tokenise([one], tokenizer)
    if isinstance(done, DroppedRow):
        return done
    shown = [
        tokenizer.decode(getattr(done.pair, part)) for part in ("prompt", "chosen", "rejected")
    ]
    # a token that holds the end of the prompt is this small tokenizer's doing, not the template's
    return (*shown, tuple(note for note in done.notes if note is not RowNote.STRADDLE))


# --- the table -----------------------------------------------------------------------------------


def said(name: str, *kinds: str) -> str:
    found = {}
    for kind in kinds:
        done = outcome(name, kind)
        for what in [done.why] if isinstance(done, DroppedRow) else done[3]:
            found[SHORT[what]] = None
    return ", ".join(found) or "nothing"


def texts(name: str, kind: str) -> tuple[str, str] | None:
    """Prompt and chosen response as the template writes them; None if it does not."""
    one = read_row(ROWS[kind], 0, find_format(list(ROWS[kind])))
    sides = spans(one, tokenizer_of(name))
    if isinstance(sides, DroppedRow):
        return None
    return sides[0].text[: sides[0].start], sides[0].text[sides[0].start :]


def does_with_system(name: str) -> str:
    found = texts(name, "system")
    if found is None:
        return "refuses it"
    before, there, after = found[0].partition(SYSTEM["content"])
    if not there:
        return "left out, unless the last turn is the user's"
    _, bos, special = TEMPLATES[name]
    if bos and before == bos:
        return "as it is, before the first turn"
    special = special.split()
    between = after.partition(USER["content"])[0]
    own = (
        "a turn of its own"
        if any(token in between for token in special)
        else "before the user's text"
    )
    always = texts(name, "plain")[0].partition(USER["content"])[0]
    return own + ("; one is there without it" if "system" in always else "")


def does_with_reasoning(name: str) -> str:
    words = []
    for kind, what in (("reasoning", "`<think>`"), ("reasoning_content", "`reasoning_content`")):
        found = texts(name, kind)
        words.append(f"{what} {'kept' if found and THOUGHT in found[1] else 'cut'}")
    earlier = texts(name, "earlier")
    words.append(f"earlier turns' {'kept' if earlier and OTHER in earlier[0] else 'cut'}")
    return ", ".join(words)


def does_with_tools(name: str) -> str:
    listed, call = texts(name, "tools"), texts(name, "call")
    there = "listed" if listed and "look_up" in listed[0] else "left out"
    return f"{there}, calls {'written' if call and 'look_up' in call[1] else 'not written'}"


def table() -> str:
    lines = [
        "| template | system turn | reasoning | tools | `inspect` of a system turn | of reasoning "
        "| of tools and calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (title, *_) in TEMPLATES.items():
        cells = [
            title,
            does_with_system(name),
            does_with_reasoning(name),
            does_with_tools(name),
            said(name, "system"),
            said(name, "reasoning", "reasoning_content", "earlier"),
            said(name, "tools", "call"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
