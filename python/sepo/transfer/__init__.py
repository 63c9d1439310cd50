"""Carry an oracle's scores to a policy whose tokenizer is another."""

from sepo.errors import needs

with needs("train", "sepo.transfer"):
    from sepo.transfer.store import read_preferences, transfer_store

__all__ = ["read_preferences", "transfer_store"]
