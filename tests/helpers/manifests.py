"""The manifest of a store that no model scored."""

from sepo.data.store.store import FORMAT


def manifest(**entries) -> dict:
    whose = dict(oracle="o", oracle_dtype="float32", reference="r", reference_dtype="float32")
    words = dict(format=FORMAT, tokenizer="t", chat_template="none", source="s", keep=["score"])
    return {**whose, **words, "pairs": 1, "pairs_per_part": 1, **entries}
