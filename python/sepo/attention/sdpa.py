"""torch's scaled_dot_product_attention, one call a segment: any device, any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sepo.attention.terms import Arrays, Attend, Span, Terms


def why_not(terms: Terms) -> None:
    """It serves everything."""


def build(spans: tuple[Span, ...], terms: Terms, arrays: Arrays) -> Attend:
    """Split once for all pairs; at most one mask for the batch."""
    # one split: its backward is one concatenation, where every slice of the whole buffer would
    # fill a buffer of zeros
    sizes = [n for start, _, middle, end in spans for n in (middle - start, end - middle)]
    prompts = [prefix_end - start for start, prefix_end, _, _ in spans]
    masks = _Masks(sizes[::2], sizes[1::2], prompts, terms)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        parts = [x.split(sizes, 2) for x in (query, key, value)]
        outputs = []
        for pair, prompt in enumerate(prompts):
            q, k, v = (x[2 * pair] for x in parts)  # prompt and chosen: an ordinary sequence
            outputs.append(_segment(q, k, v, masks(q, k), scale, terms))
            q, own_k, own_v = (x[2 * pair + 1] for x in parts)
            if q.shape[2] > 0:
                k = torch.cat([k[:, :, :prompt], own_k], 2)
                v = torch.cat([v[:, :, :prompt], own_v], 2)
                outputs.append(_segment(q, k, v, masks(q, k), scale, terms))
        return torch.cat(outputs, 2).transpose(1, 2).contiguous()

    return attend


class _Masks:
    """Masks in which the last query is at the last key.

    Such a mask depends on the key's place minus the query's alone, so the masks of all segments
    are views of one, made for the longest.
    """

    def __init__(self, firsts: list[int], rejected: list[int], prompts: list[int], terms: Terms):
        self.softcap, self.window = terms.softcap, terms.window
        self.shift = max(prompts)  # keys before the first query, at most
        bites = self.softcap is not None or (self.window or max(firsts)) < max(firsts)
        rows = max([*rejected, *(firsts if bites else [])])
        # made where it is read: there is nothing to move
        visible = torch.ones(rows, self.shift + rows, dtype=torch.bool, device=terms.device)
        visible = visible.tril(self.shift)
        if self.window is not None:
            visible = visible.triu(self.shift - self.window + 1)
        mask = torch.zeros(visible.shape, dtype=terms.dtype, device=terms.device)
        self.mask = mask.masked_fill_(~visible, -torch.inf)

    def __call__(self, query: Tensor, key: Tensor) -> Tensor | None:
        """(queries, keys) of 0 and -inf, or None where `is_causal` says the same."""
        queries, keys = query.shape[2], key.shape[2]
        whole = self.window is None or self.window >= keys
        if queries == keys and whole and self.softcap is None:
            return None
        before = keys - queries
        return self.mask[:queries, self.shift - before : self.shift + queries]


def _segment(
    query: Tensor,  # (1, H, L, E)
    key: Tensor,  # (1, H_kv, L + keys before, E)
    value: Tensor,  # (1, H_kv, L + keys before, E_v)
    mask: Tensor | None,  # (L, L + keys before)
    scale: float | None,
    terms: Terms,
) -> Tensor:  # (1, H, L, E_v)
    if terms.softcap is not None:
        return _capped(query, key, value, mask, scale, terms.softcap, terms.dropout)
    return F.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, is_causal=mask is None, dropout_p=terms.dropout, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """The definition, with all of a segment's logits at once: no fused kernel on a CPU caps them."""
    grouped = query.unflatten(1, (key.shape[1], -1))  # (1, H_kv, H / H_kv, L, E)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = grouped @ key[:, :, None].transpose(-1, -2) * scale
    logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits + mask
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.softmax(-1, dtype=precise).to(query.dtype)
    weights = F.dropout(weights, dropout)
    return (weights @ value[:, :, None]).flatten(1, 2)
