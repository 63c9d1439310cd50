"""Attention for one PackedBatch, as one function in transformers' attention interface.

A pair lies in the buffer as [prompt | chosen | rejected]. The chosen response sees the prompt and
itself; the rejected response sees the prompt and itself, never the chosen one; pairs never see
each other. A plain causal mask over the buffer is wrong. A sliding window counts positions, not
rows: a rejected token's position follows the prompt's.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from sepo.attention.layout import IMPLS, PackedLayout, check_name, choose, explain, with_arrays
from sepo.attention.terms import Terms
from sepo.errors import InputError

__all__ = [
    "ATTENTION", "IMPLS", "PackedLayout", "Terms", "check_name", "choose", "explain",
    "packed_attention", "why_not", "windows", "windows_missed", "with_arrays",
]  # fmt: skip
ATTENTION = "sepo"  # the name under which transformers knows packed_attention
SERVED = {"full_attention", "sliding_attention"}  # kinds of layer


@torch.compiler.disable  # its Python runs over the spans: a graph of it would be one batch's alone
def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, N, E)
    key: Tensor,  # (1, H_kv, N, E); H is a multiple of H_kv
    value: Tensor,  # (1, H_kv, N, E_v)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs,  # whatever else the model's layers hand down; what would change the result is refused
) -> tuple[Tensor, None]:  # (1, N, H, E_v)
    """Scaled dot-product attention of one batch. Raises InputError for what it can't serve."""
    if packed_layout is None:
        raise InputError(
            f"{type(module).__name__}: no PackedBatch reached the attention; call "
            "sepo.model.hidden_states, or model.set_attn_implementation('sdpa') for anything else"
        )
    _refuse(module, attention_mask, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        # a rotary embedding in float32 has widened query and key but not value
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = packed_layout.attend(
        query, key, value,
        scale=scaling, dropout=dropout, window=sliding_window, softcap=softcap,
    )  # fmt: skip
    return output, None


def why_not(model: PreTrainedModel) -> str | None:
    """The reason why packed_attention can't serve this model, or None."""
    config = model.config.get_text_config(decoder=True)
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        return "it has cross attention"
    if kinds := set(getattr(config, "layer_types", None) or ()) - SERVED:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(r for r in rope.values() if isinstance(r, dict))):
        if (kind := parameters.get("rope_type")) in ("dynamic", "longrope"):
            return f"its rotary embedding ({kind}) depends on the longest sequence of the batch"
    return None


def windows_missed(config: PretrainedConfig, layout: PackedLayout) -> bool:
    """Whether some layer has a sliding window of which it did not tell the attention.

    Such a layer leaves the window to the mask that transformers would have made.
    """
    return Counter(windows(config, len(layout.windows))) != Counter(layout.windows)


def windows(config: PretrainedConfig, layers: int = 1) -> list[int | None]:
    """The sliding window of every layer, None for one without; of so many if it is silent on them."""
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _refuse(module: nn.Module, attention_mask: Tensor | None, kwargs: dict) -> None:
    name = type(module).__name__
    if attention_mask is not None:
        raise InputError(f"{name}: expected no attention mask, the PackedBatch is the mask")
    if getattr(module, "is_causal", True) is False:
        raise InputError(f"{name}: expected causal self-attention")
    for argument in ("s_aux", "position_bias"):
        if kwargs.get(argument) is not None:
            raise InputError(f"{name}: packed attention does not support {argument}")


AttentionInterface.register(ATTENTION, packed_attention)
