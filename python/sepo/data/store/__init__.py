"""Keep scored pairs on disk: parquet parts, hidden rows, one manifest."""

from sepo.errors import needs

with needs("train", "sepo.data.store"):
    from sepo.data.store.store import (
        FORMAT,
        IDENTITY,
        MANIFEST,
        PART,
        SHOWN,
        ScoredStore,
        StoreWriter,
        is_store,
        num_parts,
        pairs_hash,
        read_manifest,
        template_hash,
        tokenizer_hash,
        verify_store,
    )

__all__ = [
    "FORMAT",
    "IDENTITY",
    "MANIFEST",
    "PART",
    "SHOWN",
    "ScoredStore",
    "StoreWriter",
    "is_store",
    "num_parts",
    "pairs_hash",
    "read_manifest",
    "template_hash",
    "tokenizer_hash",
    "verify_store",
]
