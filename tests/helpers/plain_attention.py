"""Attention by its definition, and a plain kernel with the calling convention of flash attention."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from sepo.attention import layout, varlen

EXACT = "exact"  # like transformers' "eager", whose softmax rounds to float32


def plain(
    query: Tensor,  # (H, L, E)
    key: Tensor,  # (H_kv, keys, E)
    value: Tensor,  # (H_kv, keys, E_v)
    visible: Tensor,  # (L, keys) bool
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:  # (H, L, E_v)
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    logits = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def plain_flash(
    query: Tensor,  # (N, H, E)
    key: Tensor,  # (N_kv, H_kv, E)
    value: Tensor,  # (N_kv, H_kv, E_v)
    cu_queries: Tensor,  # (sequences + 1,) int32
    cu_keys: Tensor,
    longest_queries: int,
    longest_keys: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (N, H, E_v)
    """Sequence by sequence, causal, the last query at the last key."""
    assert query.dtype == key.dtype == value.dtype
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert (cu_queries[-1], cu_keys[-1]) == (len(query), len(key))
    outputs, longest = [], (0, 0)
    for i in range(len(cu_queries) - 1):
        q = query[cu_queries[i] : cu_queries[i + 1]].transpose(0, 1)
        k, v = (x[cu_keys[i] : cu_keys[i + 1]].transpose(0, 1) for x in (key, value))
        queries, keys = q.shape[1], k.shape[1]
        assert queries > 0, "kernels differ in what they make of a sequence without queries"
        behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        visible = (behind >= 0) & (behind < (window or keys))
        outputs.append(plain(q, k, v, visible, scale=scale, softcap=softcap).transpose(0, 1))
        longest = max(longest[0], queries), max(longest[1], keys)
    assert longest == (longest_queries, longest_keys)
    return torch.cat(outputs)


# varlen with a plain kernel in place of flash attention: its gather, offsets, alignment
PLAIN_VARLEN = replace(
    layout.IMPLS[0], build=partial(varlen.build, kernel=plain_flash),
    absent=lambda: None, why_not=lambda terms: None, detail=lambda terms: "",
)  # fmt: skip


def serve_varlen_anywhere(monkeypatch):
    monkeypatch.setattr(layout, "IMPLS", (PLAIN_VARLEN, *layout.IMPLS[1:]))


def built(impl, spans, terms):
    """Attention of one batch by an implementation, its arrays made on the way."""
    arrays = {n: torch.from_numpy(x) for n, x in impl.arrays(spans, terms.window).items()}
    return impl.build(spans, terms, arrays)


def visible_rows(spans, *, window: int | None = None) -> Tensor:  # (N, N) bool
    """What each row of a packed buffer may see, one token at a time."""
    owner = {}  # row: (pair, segment, position)
    for pair, (start, prefix_end, middle, end) in enumerate(spans):
        prompt = prefix_end - start
        owner |= {r: (pair, "prompt", r - start) for r in range(start, prefix_end)}
        owner |= {r: (pair, "chosen", r - start) for r in range(prefix_end, middle)}
        owner |= {r: (pair, "rejected", prompt + r - middle) for r in range(middle, end)}
    visible = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for i, (pair, segment, position) in owner.items():
        for j, (other, kind, earlier) in owner.items():
            visible[i, j] = (
                pair == other
                and kind in ("prompt", segment)
                and 0 <= position - earlier < (window or np.inf)
            )
    return visible


def _exact(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = mask[0, 0] == 0
    output = plain(query[0], key[0], value[0], visible, scale=scale, softcap=softcap)
    return output[None].transpose(1, 2), None


AttentionInterface.register(EXACT, _exact)
AttentionMaskInterface.register(EXACT, eager_mask)
