"""A preference row in messages, and what is read of it."""

from sepo.data.read.formats import DroppedRow, Preference, find_format, read_row

USER = {"role": "user", "content": "Which river?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "The Rhine."}
BAD = {"role": "assistant", "content": "No idea."}


def read(row: dict, number: int = 7, **options) -> Preference | DroppedRow:
    return read_row(row, number, find_format(list(row), **options), **options)


def check_messages(preference: Preference, prompt: list[dict]) -> None:
    assert isinstance(preference, Preference), preference
    assert preference.prompt == prompt
    assert (preference.chosen, preference.rejected) == (GOOD, BAD)
