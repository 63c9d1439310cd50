"""The Triton kernels of target_logits: rows of the head at the targets, read where they lie.

Sums over D and over targets are in float32. Each has one program and one order. A target outside of
[0, V) is absent: nothing is read or written for it. Tiles are of D, which is a multiple of 16 in all
but toys. Triton knows it then, and the last tile's mask does not narrow its loads.
"""

import triton
import triton.language as tl

# as triton_rows.UNSPECIALISED: one compilation for every number of rows and targets
UNSPECIALISED = {
    "do_not_specialize": ["K", "V", "entries"],
    "do_not_specialize_on_alignment": [
        "targets_ptr", "dots_ptr", "coefficient_ptr", "sorted_ptr", "order_ptr",
    ],
}  # fmt: skip
TERMS = tl.constexpr(8)  # rows that are added up side by side: their loads are under way at once


@triton.jit(**UNSPECIALISED)
def target_dots(
    x_ptr,  # (M, D)
    weight_ptr,  # (V, D)
    targets_ptr,  # (M, K)
    dots_ptr,  # (M, K) out: 0 where absent
    stride_x,
    stride_weight,
    K,
    V,
    D,
    BLOCK_V: tl.constexpr,  # columns of a tile, here of D
):
    entry = tl.program_id(0)
    target = tl.load(targets_ptr + entry)
    x_ptr += (entry // K).to(tl.int64) * stride_x
    total = tl.zeros((BLOCK_V,), tl.float32)  # a sum in each lane, added up once at the end
    if (target >= 0) & (target < V):
        weight_ptr += target * stride_weight
        for start in range(0, D, BLOCK_V):
            d = start + tl.arange(0, BLOCK_V)
            x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            total += x * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(dots_ptr + entry, tl.sum(total, 0))


@triton.jit(**UNSPECIALISED)
def target_sums(
    coefficient_ptr,  # (M, K) float32
    weight_ptr,  # (V, D)
    targets_ptr,  # (M, K)
    sums_ptr,  # (M, D) float32 out
    stride_weight,
    stride_sums,
    K,
    V,
    D,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((TERMS, BLOCK_V), tl.float32)
    for start in range(0, K, TERMS):
        k = start + tl.arange(0, TERMS)
        target = tl.load(targets_ptr + row * K + k, mask=k < K, other=-1)
        present = (target >= 0) & (target < V)
        factor = tl.load(coefficient_ptr + row * K + k, mask=present, other=0.0)
        place = weight_ptr + target[:, None] * stride_weight + d[None, :]
        head = tl.load(place, mask=present[:, None] & (d < D)[None, :], other=0.0)
        total += factor[:, None] * head.to(tl.float32)
    tl.store(sums_ptr + row * stride_sums + d, tl.sum(total, 0), mask=d < D)


@triton.jit(**UNSPECIALISED)
def target_add(
    grad_ptr,  # (V, D) added to
    coefficient_ptr,  # (M, K) float32
    x_ptr,  # (M, D)
    sorted_ptr,  # (entries,) the targets in rising order
    order_ptr,  # (entries,) where in (M, K) they come from
    stride_grad,
    stride_x,
    entries,
    K,
    V,
    D,
    BLOCK_V: tl.constexpr,
):
    first = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    # the program of a target's first entry adds up all of them
    if (target != before) & (target >= 0) & (target < V):
        total = tl.zeros((TERMS, BLOCK_V), tl.float32)
        more = True
        while more:
            entry = first + tl.arange(0, TERMS)
            own = tl.load(sorted_ptr + entry, mask=entry < entries, other=-1) == target
            source = tl.load(order_ptr + entry, mask=own, other=0)
            factor = tl.load(coefficient_ptr + source, mask=own, other=0.0)
            place = x_ptr + (source // K)[:, None] * stride_x + d[None, :]
            x = tl.load(place, mask=own[:, None] & (d < D)[None, :], other=0.0)
            total += factor[:, None] * x.to(tl.float32)
            first += TERMS
            more = tl.sum(own.to(tl.int32), 0) == TERMS
        grad_ptr += target * stride_grad
        grad = tl.load(grad_ptr + d, mask=d < D, other=0.0).to(tl.float32) + tl.sum(total, 0)
        tl.store(grad_ptr + d, grad.to(grad_ptr.dtype.element_ty), mask=d < D)
