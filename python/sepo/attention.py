"""Attention for one PackedBatch, as one function in transformers' attention interface.

A pair lies in the buffer as [prompt | chosen | rejected]. The chosen response sees the prompt and
itself; the rejected response sees the prompt and itself, never the chosen one; pairs never see
each other. A plain causal mask over the buffer is wrong.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from sepo.data.types import PackedBatch
from sepo.errors import InputError

ATTENTION = "sepo"  # the name under which transformers knows packed_attention


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, N, head width)
    key: Tensor,  # (1, H_kv, N, head width); H is a multiple of H_kv
    value: Tensor,  # (1, H_kv, N, head width)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_batch: PackedBatch | None = None,
    **kwargs,  # whatever else the model's layers hand down; what would change the result is refused
) -> tuple[Tensor, None]:  # (1, N, H, head width)
    """Scaled dot-product attention, one call a segment. Raises InputError for what it can't serve."""
    if packed_batch is None:
        raise InputError(
            f"{type(module).__name__}: no PackedBatch reached the attention; call "
            "sepo.model.hidden_states, or model.set_attn_implementation('sdpa') for anything else"
        )
    _refuse(module, attention_mask, kwargs)
    attend = lambda q, k, v, **mask: F.scaled_dot_product_attention(
        q, k, v, scale=scaling, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1], **mask
    )
    # one split for all pairs: its backward is one concatenation, where every slice of the whole
    # buffer would fill a buffer of zeros
    sizes = [n for a, _, b, c in packed_batch.spans for n in (b - a, c - b)]
    parts = [x.split(sizes, 2) for x in (query, key, value)] if sizes else ()
    outputs = []
    for pair, (start, prefix_end, _, _) in enumerate(packed_batch.spans):
        q, k, v = (x[2 * pair] for x in parts)  # prompt and chosen: an ordinary causal sequence
        outputs.append(attend(q, k, v, is_causal=True))
        rejected = [x[2 * pair + 1] for x in parts]
        if rejected[0].shape[2] > 0:
            prompt = prefix_end - start
            k, v = (
                torch.cat([x[:, :, :prompt], y], 2)
                for x, y in zip((k, v), rejected[1:], strict=True)
            )
            mask = _lower_right(rejected[0].shape[2], k.shape[2], query.device)
            outputs.append(attend(rejected[0], k, v, attn_mask=mask))
    if not outputs:  # the one row of a batch without pairs: it sees itself
        outputs.append(attend(query, key, value, is_causal=True))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def why_not(model: PreTrainedModel) -> str | None:
    """The reason why packed_attention can't serve this model, or None."""
    config = model.config.get_text_config(decoder=True)
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        return "it has cross attention"
    if softcap := getattr(config, "attn_logit_softcapping", None):
        return f"its attention logits are soft-capped at {softcap}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention"}:
        return f"it has layers of type {', '.join(sorted(kinds - {'full_attention'}))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return f"it has a sliding window of {window} tokens"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"its rotary embedding ({rope}) depends on the longest sequence of the batch"
    return None


def _refuse(module: nn.Module, attention_mask: Tensor | None, kwargs: dict) -> None:
    name = type(module).__name__
    if attention_mask is not None:
        raise InputError(f"{name}: expected no attention mask, the PackedBatch is the mask")
    if getattr(module, "is_causal", True) is False:
        raise InputError(f"{name}: expected causal self-attention")
    for argument in ("softcap", "sliding_window", "s_aux", "position_bias"):
        if kwargs.get(argument) is not None:
            raise InputError(f"{name}: packed attention does not support {argument}")


def _lower_right(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Causal with the last query at the last key: (num_queries, num_keys), True where it may see."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(num_keys - num_queries)


AttentionInterface.register(ATTENTION, packed_attention)
