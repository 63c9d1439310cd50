"""FlexAttention: one kernel call a layer, compiled for CUDA. On a CPU torch has its forward only."""

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sepo.attention.terms import Arrays, Attend, Span, Terms
from sepo.errors import InputError

BLOCK = 128  # rows and keys of one block of the mask, what the kernels expect unless told
COMPILED_ON = ("cuda",)
BACKEND = "inductor"
ROWS = ("own", "first", "last")  # what each row sees, by `_visible`


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


def arrays(spans: tuple[Span, ...], window: int | None) -> dict[str, np.ndarray]:
    """A block mask made from plain integers: nothing is compiled for it, nothing (N, N) exists."""
    blocks = -(-spans[-1][3] // BLOCK)
    rows, keys, seen = _seen(np.array(spans, np.int64), window)
    whole = seen == BLOCK * BLOCK
    lists = dict(zip(ROWS, _visible(spans, window), strict=True))
    for name, listed in (("", (seen > 0) & ~whole), ("full_", whole)):
        r, k = rows[listed], keys[listed]
        for side, (number, indices) in (("kv", _lists(r, k, blocks)), ("q", _lists(k, r, blocks))):
            lists |= {f"{name}{side}_num_blocks": number, f"{name}{side}_indices": indices}
    return lists


def build(spans: tuple[Span, ...], terms: Terms, arrays: Arrays) -> Attend:
    mask = _block_mask(arrays)
    compiled = terms.device.type in COMPILED_ON
    attention = _compiled(_kind(terms)) if compiled else _attention(_text(terms.softcap))

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        out = attention(query, key, value, mask, _text(scale))
        return out.transpose(1, 2).contiguous()

    return attend


def _text(number: float | None) -> str | None:
    """A constant to the compiler, which makes any float that it is given dynamic, as it does sizes."""
    return None if number is None else repr(float(number))


def _attention(softcap: str | None):
    def capped(score, batch, head, q_row, k_row):
        # where there is one
        return float(softcap) * torch.tanh(score / float(softcap))  # type: ignore[arg-type]

    def attention(query, key, value, mask, scale: str | None):
        return flex_attention(
            query, key, value, block_mask=mask,
            score_mod=None if softcap is None else capped,
            scale=None if scale is None else float(scale),
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    return attention


def _kind(terms: Terms) -> Terms:
    """Tell what a kernel is compiled for, beside the sizes of a batch: a window is in its mask."""
    return replace(terms, window=None)


@cache
def _compiled(kind: Terms):
    """One function a kind, for batches of any size: compiled, or an error.

    The compiler counts by code object, and after so many compilations runs what holds all (N, N)
    scores, without a word. So each kind has a code object of its own, sizes are dynamic from the
    start, and of a full graph giving up is an error.
    """
    plain = _attention(_text(kind.softcap))
    code = plain.__code__.replace()
    own = FunctionType(code, plain.__globals__, "flex", closure=plain.__closure__)
    attention = torch.compile(own, dynamic=True, fullgraph=True, backend=BACKEND)

    def call(query, key, value, mask, scale):
        # hooks on compiled layers make all else run eagerly, which this must not
        with torch.compiler.set_stance("default"):
            try:
                return attention(query, key, value, mask, scale)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                limit = torch._dynamo.config.recompile_limit
                raise InputError(
                    f"attn_impl=flex: expected at most {limit} compilations of a kernel "
                    f"(torch._dynamo.config.recompile_limit), got one more, for {query.shape[2]} "
                    "rows: raise it, or take another --attn_impl"
                ) from error

    return call


def _block_mask(arrays: Arrays) -> BlockMask:
    # tensors of their own: compiled code would look at where in a shared buffer each view begins
    lists: dict[str, Any] = {n: a.clone() for n, a in arrays.items() if n not in ROWS}
    own, first, last = (arrays[name].clone() for name in ROWS)

    def may_see(batch, head, q_row, k_row):
        itself = (k_row >= own[q_row]) & (k_row <= q_row)
        return itself | ((k_row >= first[q_row]) & (k_row < last[q_row]))

    rows = len(own)
    return BlockMask(seq_lengths=(rows, rows), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=may_see, **lists)


def _visible(spans: tuple[Span, ...], window: int | None) -> np.ndarray:  # (3, N) int32
    """Row i sees [own, i] and, of the prompt, [first, last). A window counts positions, not rows."""
    own, first, last = visible = np.zeros((3, spans[-1][3]), np.int32)
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
    return visible


def _seen(
    spans: np.ndarray,  # (P, 4)
    window: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (B,) int64 each
    """Blocks of rows, blocks of keys, and how many of the keys in there are seen, over all rows.

    Counted pair by pair, over the blocks that a pair lies in: what it costs grows with the batch,
    not with its square. Ascending by rows, then keys; each block once.
    """
    low = spans[:, 0] // BLOCK
    wide = -(-spans[:, 3] // BLOCK) - low  # blocks that a pair lies in
    area = wide**2
    pair = np.repeat(np.arange(len(spans)), area)
    place = np.arange(len(pair)) - np.repeat(np.cumsum(area) - area, area)
    rows, keys = low[pair] + place // wide[pair], low[pair] + place % wide[pair]
    start, prefix_end, middle, end = spans[pair].T
    counts = (
        _band(rows, keys, (start, middle), (start, middle), 0, window)
        + _band(rows, keys, (middle, end), (middle, end), 0, window)
        + _band(rows, keys, (middle, end), (start, prefix_end), middle - prefix_end, window)
    )
    columns = -(-spans[-1, 3] // BLOCK)
    blocks, where = np.unique(rows * columns + keys, return_inverse=True)  # neighbours share some
    return *divmod(blocks, columns), np.bincount(where, counts).astype(np.int64)


def _band(rows, keys, of_rows, of_keys, shift, window: int | None) -> np.ndarray:  # (B,) int64
    """Pairs with 0 <= row - shift - key < window, row and key in their blocks and bounds."""
    row, row_end = (np.clip(BLOCK * (rows + i), *of_rows) - shift for i in (0, 1))
    key, key_end = (np.clip(BLOCK * (keys + i), *of_keys) for i in (0, 1))

    def from_distance(least: int):  # pairs at least so far apart: a triangle at each corner
        triangle = lambda n: np.maximum(n, 0) * (np.maximum(n, 0) + 1) // 2
        corners = triangle(row_end - key - least) - triangle(row - key - least)
        return corners - triangle(row_end - key_end - least) + triangle(row - key_end - least)

    return from_distance(0) - (0 if window is None else from_distance(window))


def _lists(
    rows: np.ndarray, columns: np.ndarray, blocks: int
) -> tuple[np.ndarray, np.ndarray]:  # (1, 1, blocks), (1, 1, blocks, blocks) int32
    """How many columns each row lists, and which, ascending; what stands after those is not read."""
    order = np.argsort(rows * blocks + columns)
    rows, columns = rows[order], columns[order]
    number = np.bincount(rows, minlength=blocks)
    place = np.arange(len(rows)) - (np.cumsum(number) - number)[rows]
    indices = np.zeros((blocks, blocks), np.int32)
    indices[rows, place] = columns
    return number.astype(np.int32)[None, None], indices[None, None]
