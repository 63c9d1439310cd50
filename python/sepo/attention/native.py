"""The native kernel of csrc/cpu/packed_attention.cpp: one call a layer on a CPU.

torch's own CPU kernel is called once a segment, and took a third of a SmolLM2 step: its products are
a BLAS library's, far from the peak in tiles this small, and nothing of it knows that heads share keys.
Without bfloat16 tiles a bfloat16 operand is widened to float32 as it is copied into a tile.
"""

import torch
from torch import Tensor

from sepo.attention.terms import Attend, Span, Terms
from sepo_kernels import extension

# asked once, at import, as the operators of sepo.ops do
_MISSING = extension.why_not("native_packed_attention", torch.device("cpu"))
LANES = 32  # numbers of the widest tile of a product: a head is a whole number of them
DTYPES = (torch.float32, torch.bfloat16)


def absent() -> str | None:
    return _MISSING


def why_not(terms: Terms) -> str | None:
    if terms.device.type != "cpu":
        return f"it needs tensors on a CPU, got {terms.device.type}"
    if terms.dtype not in DTYPES:
        return f"it needs float32 or bfloat16, got {terms.dtype}"
    if terms.width != terms.value_width or terms.width % LANES:
        widths = f"{terms.width} and {terms.value_width}"
        return f"it needs heads of one width, a multiple of {LANES}, got {widths}"
    if terms.dropout:
        return f"it has no dropout, the model's is {terms.dropout}"
    if terms.softcap is not None:
        return f"the logits are soft-capped at {terms.softcap}"
    return absent()


def build(spans: tuple[Span, ...], terms: Terms) -> Attend:
    pairs = torch.tensor(spans, dtype=torch.int64)  # (P, 4)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _Attention.apply(query, key, value, pairs, scale, terms.window or 0)[None]

    return attend


class _Attention(torch.autograd.Function):
    """Keeps the output and each query's log-sum-exp; backward makes the scores again."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,  # (N, H, E)
        key: Tensor,  # (N, H_kv, E)
        value: Tensor,  # (N, H_kv, E)
        spans: Tensor,  # (P, 4)
        scale: float,
        window: int,  # 0: none
    ) -> Tensor:  # (N, H, E)
        out, lse = torch.ops.sepo.native_packed_attention(
            query, key, value, spans, scale, window, extension.BFLOAT16_TILES
        )
        ctx.save_for_backward(query, key, value, out, lse, spans)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, lse, spans = ctx.saved_tensors
        grads = torch.ops.sepo.native_packed_attention_backward(
            grad, query, key, value, out, lse, spans, ctx.scale, ctx.window,
            extension.BFLOAT16_TILES,
        )  # fmt: skip
        return *grads, None, None, None
