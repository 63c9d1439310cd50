"""Flash attention over sequences of any lengths, one kernel call a layer (CUDA, 16 bits).

Two sequences a pair: [prompt | chosen] over itself, and the rejected rows over
[prompt | rejected]. The queries of both lie in the buffer in that order already; keys and values
are gathered, the prompt twice. Where keys outnumber queries the kernels align the last query with
the last key, which is what a rejected response needs.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepo.attention.terms import Arrays, Attend, Span, Terms
from sepo.errors import one_line

# kernel(query (N, H, E), key (N_kv, H_kv, E), value (N_kv, H_kv, E), cu_queries, cu_keys,
#        longest query, longest keys, scale=, window=, softcap=) -> (N, H, E)
Kernel = Callable[..., Tensor]
TORCH, FLASH_ATTN = "torch.nn.attention.varlen", "flash_attn"


def kernel_name(*, softcap: bool) -> str | None:
    """The package that serves varlen here, or None. Only flash_attn caps the logits."""
    if not softcap and {"scale", "window_size"} <= _torch_parameters():
        return TORCH
    return FLASH_ATTN if find_spec("flash_attn") is not None else None


def absent() -> str | None:
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if kernel_name(softcap=False) is None:
        return f"torch {torch.__version__} has no varlen_attn with a scale, flash_attn is missing"
    return None


def why_not(terms: Terms) -> str | None:
    if terms.device.type != "cuda":
        return f"it needs a CUDA device, got {terms.device.type}"
    if terms.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {terms.dtype}"
    if terms.width != terms.value_width or terms.width % 8 or terms.width > 256:
        widths = f"{terms.width} and {terms.value_width}"
        return f"it needs heads of one width, a multiple of 8 up to 256, got {widths}"
    if terms.dropout:
        return f"it has no dropout, the model's is {terms.dropout}"
    if torch.version.hip is None and torch.cuda.get_device_capability(terms.device) < (8, 0):
        return "it needs compute capability 8.0"
    if terms.softcap is not None and kernel_name(softcap=True) is None:
        return f"the logits are soft-capped at {terms.softcap}, which needs flash_attn"
    return absent()


def detail(terms: Terms) -> str:
    """Whose kernels run: FlashAttention 3's, or why another's."""
    if terms.softcap is not None or kernel_name(softcap=False) != TORCH:
        return "flash_attn"
    reason = _try_flash3(terms.device)
    return "FA3" if reason is None else f"FA2: {reason}"


def arrays(spans: tuple[Span, ...], window: int | None) -> dict[str, np.ndarray]:
    """Offsets of the sequences, and where each row goes among the gathered keys: a prompt twice."""
    parts, copies = [], []
    for start, prefix_end, middle, end in spans:
        parts.append(np.arange(start, middle))
        copies.append(np.full(middle - start, -1))
        if end > middle:
            parts += [np.arange(start, prefix_end), np.arange(middle, end)]
            copies += [np.arange(start, prefix_end), np.full(end - middle, -1)]
    rows = np.concatenate(parts)
    again = np.concatenate(copies)  # prompt rows whose second copy this is, else -1
    first = np.empty(spans[-1][3], np.int64)
    first[rows[again < 0]] = np.flatnonzero(again < 0)
    queries, keys = _lengths(spans)
    offsets = lambda lengths: np.cumsum([0, *lengths], dtype=np.int32)
    return {
        "cu_queries": offsets(queries),
        "cu_keys": offsets(keys),
        "rows": rows,  # row of the buffer, for each gathered key
        "first": first,  # a gathered key, for each row of the buffer
        "shared": again[again >= 0],  # rows of the buffer gathered twice
        "second": np.flatnonzero(again >= 0),  # their other gathered key
    }


def build(
    spans: tuple[Span, ...], terms: Terms, arrays: Arrays, kernel: Kernel | None = None
) -> Attend:
    kernel = kernel or _kernel(terms)
    longest = [int(lengths.max()) for lengths in _lengths(spans)]

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        # x[0] would be a select, whose backward fills a buffer of zeros
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        key, value = (_Gather.apply(x, arrays) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = kernel(
            query, key, value, arrays["cu_queries"], arrays["cu_keys"], *longest,
            scale=scale, window=terms.window, softcap=terms.softcap,
        )  # fmt: skip
        return out.unsqueeze(0)

    return attend


def _lengths(spans: tuple[Span, ...]) -> tuple[np.ndarray, np.ndarray]:  # (sequences,) each
    """Queries and keys of every sequence."""
    starts, prefix_ends, middles, ends = np.array(spans, dtype=np.int64).T
    first, rejected = middles - starts, ends - middles
    queries = np.stack([first, rejected], 1).ravel()
    keys = np.stack([first, prefix_ends - starts + rejected], 1).ravel()
    # an empty rejected response is no sequence: kernels differ in what they make of no queries
    return queries[queries > 0], keys[queries > 0]


class _Gather(torch.autograd.Function):
    """x[rows] with a backward that adds in a fixed order: index_select's own would race."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Arrays) -> Tensor:
        ctx.places = places
        return x.index_select(0, places["rows"])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        places = ctx.places
        total = grad.index_select(0, places["first"])
        # no row is in `shared` twice, so there is one addition a row and no order to fix
        total.index_add_(0, places["shared"], grad.index_select(0, places["second"]))
        return total, None


def _torch_parameters() -> set[str]:
    """2.10 has no scale and no window, 2.11 has both, 2.12 must be told of grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def _kernel(terms: Terms) -> Kernel:
    if kernel_name(softcap=terms.softcap is not None) == FLASH_ATTN:
        return _flash_attn_kernel()
    _try_flash3(terms.device)
    return _torch_kernel()


def _try_flash3(device: torch.device) -> str | None:
    """Have FlashAttention 3 stand in for torch's flash kernels, or say why it can't."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} has no other"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return "FA3 needs compute capability 9.0"
    if find_spec("flash_attn_interface") is None:
        return "FA3's flash_attn_interface is not installed"
    return _activate_flash3()


@cache  # for the whole process: torch's dispatcher is told
def _activate_flash3() -> str | None:
    if (chosen := torch.nn.attention.current_flash_attention_impl()) is not None:
        return None if chosen == "FA3" else f"{chosen} was activated"
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # an extension for another torch or CUDA: whatever its import raises
        return f"FA3 can't be loaded: {one_line(error)}"
    return None


def _torch_kernel() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _torch_parameters() else {}

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window, softcap):
        sides = (-1 if window is None else window - 1, 0)  # (-1, 0) means causal, exactly so
        return varlen_attn(
            query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=sides, **grouped
        )

    return kernel


def _flash_attn_kernel() -> Kernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window, softcap):
        sides = (-1 if window is None else window - 1, 0)
        return flash_attn_varlen_func(
            query, key, value, cu_q, cu_k, max_q, max_k,
            softmax_scale=scale, causal=True, window_size=sides, softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return kernel
