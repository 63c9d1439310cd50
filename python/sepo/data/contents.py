"""Name data by its contents, a pair at a time."""

import hashlib

import numpy as np

from sepo.data.store.part import TOKENS, WEIGHTS
from sepo.data.types import TokenPair

PAIRS = ("id", *TOKENS, *WEIGHTS)
SCORES = ("chosen_score", "rejected_score")
REF_LOGP = ("chosen_ref_logp", "rejected_ref_logp")


class ContentHash:
    """SHA-256 of some fields of the pairs that it is given, in their order."""

    def __init__(self, fields: tuple[str, ...]):
        self._fields, self._digest, self._empty = fields, hashlib.sha256(), True

    def add(self, pair: TokenPair) -> None:
        parts = []
        for name in self._fields:
            value = getattr(pair, name, None)
            if value is None:
                parts.append(b"-;")
                continue
            self._empty = False
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
            else:
                value = np.asarray(value, np.int32 if name in TOKENS else np.float32).tobytes()
            # the length too, or values could move from one field to the next unseen
            parts += b"%d:" % len(value), value
        self._digest.update(b"".join(parts))

    def hexdigest(self) -> str | None:
        """16 hex digits; None if no pair had a value."""
        return None if self._empty else self._digest.hexdigest()[:16]
