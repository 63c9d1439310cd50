"""Serve transformers models on packed batches: load, prepare, run, refer to, feed."""

from sepo.errors import needs

with needs("train", "sepo.model"):
    from sepo.model.forward import (
        Head,
        attn_impl,
        head,
        hidden_states,
        restore_attention,
        token_logprob,
        vocabulary,
    )
    from sepo.model.load import load_model, load_tokenizer
    from sepo.model.prepare import (
        attention_needs,
        explain_attention,
        prepare_model,
        probe_logprob,
        rounding,
    )

__all__ = [
    "Head",
    "attention_needs",
    "attn_impl",
    "explain_attention",
    "head",
    "hidden_states",
    "load_model",
    "load_tokenizer",
    "prepare_model",
    "probe_logprob",
    "restore_attention",
    "rounding",
    "token_logprob",
    "vocabulary",
]
