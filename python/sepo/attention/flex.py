"""FlexAttention: one kernel call a layer, compiled for CUDA. On a CPU torch has its forward only."""

from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sepo.attention.terms import Attend, Span, Terms

BLOCK = 128  # rows and keys of one block of the mask, what the kernels expect unless told


def absent() -> str | None:
    if torch.cuda.is_available() and find_spec("triton") is None:
        return "it needs triton, which is not installed"
    return None


def why_not(terms: Terms) -> str | None:
    if terms.dropout:
        return f"it has no dropout, the model's is {terms.dropout}"
    if terms.device.type == "cpu":
        return "torch has no FlexAttention backward on a CPU" if terms.gradient else None
    if terms.device.type != "cuda":
        return f"it needs a CUDA device, got {terms.device.type}"
    if terms.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it needs float32, float16 or bfloat16, got {terms.dtype}"
    if min(terms.width, terms.value_width) < 16:
        return f"it needs heads at least 16 wide, got {terms.width} and {terms.value_width}"
    return absent()


def worth_it(terms: Terms) -> bool:
    """Its float32 products are slow, and on a CPU it holds all of a head's scores."""
    return terms.device.type == "cuda" and terms.dtype.itemsize == 2


def build(spans: tuple[Span, ...], terms: Terms) -> Attend:
    """A block mask made from plain integers: nothing is compiled for it, nothing (N, N) exists."""
    mask = _block_mask(spans, terms)
    cap = terms.softcap

    def capped(score, batch, head, q_row, k_row):
        return cap * torch.tanh(score / cap)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        flex = _compiled() if terms.device.type == "cuda" else flex_attention
        out = flex(
            query, key, value,
            score_mod=None if cap is None else capped, block_mask=mask, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).contiguous()

    return attend


@cache
def _compiled():
    return torch.compile(flex_attention)


def _visible(spans: tuple[Span, ...], window: int | None) -> np.ndarray:  # (3, N) int32
    """Row i sees [own, i] and, of the prompt, [first, last). A window counts positions, not rows."""
    own, first, last = np.zeros((3, spans[-1][3]), np.int32)
    for start, prefix_end, middle, end in spans:
        own[start:middle] = start
        own[middle:end] = middle
        first[middle:end], last[middle:end] = start, prefix_end
        if window is not None:
            rows = np.arange(start, end)
            own[start:end] = np.maximum(own[start:end], rows - window + 1)
            # a rejected row's position is as many less than its row as there are chosen rows
            oldest = rows[middle - start :] - (middle - prefix_end) - window + 1
            first[middle:end] = np.clip(oldest, start, prefix_end)
    return np.stack([own, first, last])


def _block_mask(spans: tuple[Span, ...], terms: Terms) -> BlockMask:
    visible = _visible(spans, terms.window)
    move = lambda x: torch.from_numpy(x).to(terms.device, non_blocking=True)
    own, first, last = (move(x) for x in visible)

    def may_see(batch, head, q_row, k_row):
        itself = (k_row >= own[q_row]) & (k_row <= q_row)
        return itself | ((k_row >= first[q_row]) & (k_row < last[q_row]))

    counts = _counts(visible)
    whole = counts == BLOCK * BLOCK
    part = (counts > 0) & ~whole
    lists = dict(
        kv=_lists(part), full_kv=_lists(whole), q=_lists(part.T), full_q=_lists(whole.T)
    )  # fmt: skip
    blocks = {}
    for name, (number, indices) in lists.items():
        for key, values in ((f"{name}_num_blocks", number), (f"{name}_indices", indices)):
            blocks[key] = move(values[None, None])
    rows = visible.shape[1]
    return BlockMask(
        seq_lengths=(rows, rows), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=may_see, **blocks
    )


def _counts(visible: np.ndarray) -> np.ndarray:  # (blocks, blocks) keys that queries see
    rows = np.arange(visible.shape[1], dtype=np.int32)
    edges = np.arange(0, len(rows), BLOCK, dtype=np.int32)
    own, first, last = visible[:, :, None]

    def overlap(low, high):  # of [low, high) with each block of keys: (N, blocks)
        return np.maximum(np.minimum(high, edges + BLOCK) - np.maximum(low, edges), 0)

    return np.add.reduceat(overlap(own, rows[:, None] + 1) + overlap(first, last), edges, axis=0)


def _lists(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks of each row are set, and their columns before all others'."""
    columns = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return blocks.sum(1).astype(np.int32), columns
