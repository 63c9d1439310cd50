"""Products of the heads, and sums over repeated rows and targets."""

import torch
from torch import Tensor

from sepo_kernels.platform import accumulator

WEIGHT_TILE_BYTES = 32 << 20  # of weight cast to float32 at once, where the GEMM cannot widen


def logits(
    out: Tensor,  # (chunk, V) accumulator dtype, written
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D), x's dtype
) -> None:
    """out = x @ weight.T, summed and kept in out's dtype: bfloat16 logits cost 1e-2 nats."""
    V, D = weight.shape
    if x.dtype == out.dtype:
        torch.mm(x, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = x.to(out.dtype)
        tile = max(1, WEIGHT_TILE_BYTES // (out.itemsize * D))
        for v in range(0, V, tile):
            torch.mm(wide, weight[v : v + tile].to(out.dtype).T, out=out[:, v : v + tile])


def remark(x: Tensor, fused: bool) -> tuple[str, ...]:
    """What a user may want to know of how `x`'s logits are made: no line, or one."""
    if fused:
        return ("the logits stay in cache: only what is kept is written",)
    if x.is_cuda or x.dtype == accumulator(x.dtype):
        return ()
    return (f"no {x.dtype} tiles with float32 sums here: operands are widened to float32",)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in the accumulator's dtype where the library can: what is summed on is not rounded."""
    acc = accumulator(a.dtype)
    return torch.mm(a, b, out_dtype=acc) if a.is_cuda and a.dtype != acc else torch.mm(a, b)


def add_rows(
    total: Tensor,  # (N, D), added to
    rows: Tensor,  # (M,) may repeat: their terms are added, in a fixed order
    values: Tensor,  # (M, D)
) -> None:
    if total.is_cuda:
        # sorts the indices; index_add_ would use float atomics, in another order every time
        total.index_put_((rows.long(),), values, accumulate=True)
    else:
        total.index_add_(0, rows, values)


def add_targets(
    grad_weight: Tensor,  # (V, D), added to
    targets: Tensor,  # (M,) may repeat: their terms are summed before the dtype rounds the sum
    values: Tensor,  # (M, D) accumulator dtype
) -> None:
    some, place = targets.unique(return_inverse=True)
    total = grad_weight.index_select(0, some).to(values.dtype).index_add_(0, place, values)
    grad_weight.index_copy_(0, some, total.to(grad_weight.dtype))
