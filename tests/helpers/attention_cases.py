"""Random queries, keys and values of packed pairs, and what attention is to give of them."""

import numpy as np
import torch
from plain_attention import plain, visible_rows

from sepo.attention import Terms

# prompt, chosen and rejected tokens: all long, then one of them short or missing
LENGTHS = [(7, 5, 9), (1, 6, 3), (4, 0, 5), (5, 3, 0), (3, 0, 0), (2, 1, 1), (9, 2, 12)]


def spans_of(lengths):
    spans, start = [], 0
    for prompt, chosen, rejected in lengths:
        ends = np.cumsum([prompt, chosen, rejected]) + start
        spans.append((start, *ends.tolist()))
        start = spans[-1][-1]
    return tuple(spans)


def tensors(spans, *, heads=4, kv_heads=2, width=8, value_width=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda h, e: torch.randn(
        1, h, spans[-1][-1], e, generator=g, dtype=torch.float64
    ).requires_grad_()  # fmt: skip
    return draw(heads, width), draw(kv_heads, width), draw(kv_heads, value_width)


def terms_of(query, value, **options):
    return Terms(
        device=query.device, dtype=query.dtype, width=query.shape[-1],
        value_width=value.shape[-1], gradient=True, **options,
    )  # fmt: skip


def definition(inputs, spans, *, scale, window=None, softcap=None):
    visible = visible_rows(spans, window=window)
    q, k, v = (x[0] for x in inputs)
    return plain(q, k, v, visible, scale=scale, softcap=softcap).transpose(0, 1)[None]


def asked(device="cuda", dtype=torch.bfloat16, width=64, gradient=True, **options):
    return Terms(torch.device(device), dtype, width, options.pop("value_width", width), gradient,
                 **options)  # fmt: skip
