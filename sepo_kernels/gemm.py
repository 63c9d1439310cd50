"""GEMMs of the heads, and sums over repeated rows and targets."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sepo_kernels import devices
from sepo_kernels.devices import accumulator

WIDE_TILE_BYTES = 2 << 20  # of the part of an operand that is widened at once, to stay in cache


def logits(
    out: Tensor,  # (chunk, V) accumulator dtype, written
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D), x's dtype
) -> None:
    """Write x @ weight.T, summed and stored in out's dtype: bfloat16 logits cost 1e-2 nats."""
    V, D = weight.shape
    if x.dtype == out.dtype:
        torch.mm(x, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = x.to(out.dtype)
        for v in _tiles(V, D * out.itemsize):
            torch.mm(wide, weight[v].to(out.dtype).T, out=out[:, v])


def dtype_note(x: Tensor, fused: bool) -> tuple[str, ...]:
    """Say in one line, or none, how the dtype of `x` decides the way its logits are made."""
    if fused:
        return ("the logits stay in cache: only what is saved is written",)
    if x.is_cuda or x.dtype == accumulator(x.dtype):
        return ()
    return (f"no {x.dtype} tiles with float32 sums here: operands are widened to float32",)


def gemm(
    a: Tensor,  # (m, k)
    b: Tensor,  # (k, n), a's dtype
    *,
    out: Tensor | None = None,  # (m, n), written, in a's dtype or in the accumulator's
) -> Tensor:  # (m, n), out or a new one, in the accumulator's dtype where the library can
    """Return a @ b, summed in the accumulator's dtype: partial sums are not rounded.

    Where a CPU multiplies 16 bits slowly the operands are widened, a tile at a time.
    """
    acc = accumulator(a.dtype)
    if not a.is_cuda and a.dtype != acc and not devices.multiplies(a.dtype):
        return _widened(
            a, b, a.new_empty((a.shape[0], b.shape[1]), dtype=acc) if out is None else out
        )
    if out is None:
        return torch.mm(a, b, out_dtype=acc) if a.is_cuda and a.dtype != acc else torch.mm(a, b)
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=acc, out=out) if a.is_cuda else out.copy_(torch.mm(a, b))


def add_gemm(
    total: Tensor,  # (m, n) in the accumulator's dtype, added to
    a: Tensor,  # (m, k)
    b: Tensor,  # (k, n), a's dtype
) -> None:
    """Add a @ b to `total`; on a GPU within the GEMM, which saves two passes over both."""
    if not total.is_cuda:
        total += gemm(a, b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _widened(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b by tiles of a's longer side, which is the vocabulary where there is one."""
    acc = accumulator(a.dtype)
    (m, k), n = a.shape, b.shape[1]
    if m > k:
        b = b.to(acc)
        for i in _tiles(m, k * acc.itemsize):
            out[i] = a[i].to(acc) @ b
        return out
    total = out if out.dtype == acc else out.new_empty(out.shape, dtype=acc)
    total.zero_()
    for i in _tiles(k, max(m, n) * acc.itemsize):
        total.addmm_(a[:, i].to(acc), b[i].to(acc))
    return out if total is out else out.copy_(total)


def _tiles(count: int, bytes_each: int) -> Iterator[slice]:
    """Cut `count` rows of `bytes_each` widened bytes into slices of WIDE_TILE_BYTES."""
    step = max(1, WIDE_TILE_BYTES // max(1, bytes_each))
    for start in range(0, count, step):
        yield slice(start, start + step)


def add_rows(
    total: Tensor,  # (N, D), added to
    rows: Tensor,  # (M,) may repeat: their terms are added, in a fixed order
    values: Tensor,  # (M, D)
) -> None:
    """Add values[m] to total[rows[m]]."""
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
    """Add values[m] to grad_weight[targets[m]], in the values' dtype."""
    distinct, place = targets.unique(return_inverse=True)
    total = grad_weight.index_select(0, distinct).to(values.dtype).index_add_(0, place, values)
    grad_weight.index_copy_(0, distinct, total.to(grad_weight.dtype))
