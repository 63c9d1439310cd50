"""Carry an oracle's scores to a policy whose tokenizer is another."""

from sepo.errors import needs

with needs("train", "sepo.transfer"):
    from sepo.transfer.store import (
        FRACTION,
        MODELS,
        OWNER,
        add_arguments,
        read_preferences,
        run,
        transfer_store,
    )

__all__ = [
    "FRACTION",
    "MODELS",
    "OWNER",
    "add_arguments",
    "read_preferences",
    "run",
    "transfer_store",
]
