"""selected_logprob_kl in plain PyTorch: library GEMMs, and passes over a few rows.

p - q is computed from log q - log p, not from two rounded numbers, whose rounding would be most of
it near the reference, where training starts. So is the target's entry of p - onehot, expm1(logp).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sepo_kernels import gemm
from sepo_kernels.scales import Scale, as_column, of_part
from sepo_kernels.selected_logprob_kl.layout import REF_POLICY, is_jsd
from sepo_kernels.selected_logprob_kl.loops import LogitKernels

# the passes take so many bytes of rows at once, because each makes up to eight temporaries of that
# size, which no budget counts: on a CPU they stay in cache, a GPU wants longer rows of work
TILE_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
LARGEST_RATIO = 60000.0  # of q to p, its logarithm: beyond, the smaller is zero all the same


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (chunk, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    ref_bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale,
    ref_softcap: float | None,
    beta: float,
    blocks: tuple[Tensor, Tensor] | None,  # (chunk, V) each, written with -dlogp/da and dkl/da
    logits: tuple[Tensor, Tensor],  # (chunk, V) each, accumulator dtype, scratch; may be blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # logp, ref_logp, kl (chunk,), state (chunk, 0)
    z, ref_z = logits
    gemm.logits(z, x, weight)
    gemm.logits(ref_z, ref_x, ref_weight)
    logp, ref_logp, kl = (z.new_empty(targets.shape) for _ in range(3))
    for part in row_tiles(z):
        tiles = None if blocks is None else (blocks[0][part], blocks[1][part])
        a, derivative = _cap(z[part], bias, of_part(scale, part), softcap, blocks is not None)
        b, _ = _cap(ref_z[part], ref_bias, of_part(ref_scale, part), ref_softcap, False)
        logp[part], ref_logp[part], kl[part] = _rows(a, b, targets[part], beta, derivative, tiles)
    return logp, ref_logp, kl, z.new_empty((z.shape[0], 0))


def recompute(*args: Any) -> None:
    """Write the blocks a second time; of loops.LogitKernels' arguments the last four are unread."""
    forward(*args[:-4])


def combine(
    first: Tensor,  # (chunk, columns)
    second: Tensor,  # (chunk, columns)
    targets: Tensor,  # (chunk,)
    start: int,
    logp: Tensor,  # (chunk,)
    kl: Tensor,  # (chunk,)
    state: Tensor,  # (chunk, 0)
    grad_logp: Tensor,  # (chunk,)
    grad_kl: Tensor,  # (chunk,)
    beta: float,
    out: Tensor,  # (chunk, columns), written
) -> None:
    negative, grad_kl = -grad_logp[:, None], grad_kl[:, None]
    for part in row_tiles(out):
        total = first[part].to(negative.dtype) * negative[part]
        total += second[part].to(negative.dtype) * grad_kl[part]
        out[part] = total


def row_tiles(block: Tensor) -> Iterator[slice]:
    """Cut the rows of `block` (chunk, V) into slices of TILE_BYTES in float32."""
    step = max(1, TILE_BYTES[block.device.type] // (4 * block.shape[1]))
    for start in range(0, block.shape[0], step):
        yield slice(start, start + step)


def _cap(
    z: Tensor,  # (tile, V) GEMM, overwritten with capped logits
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    need_derivative: bool,
) -> tuple[Tensor, Tensor | None]:  # z, the cap's derivative there (tile, V)
    if isinstance(scale, Tensor) or scale != 1.0:
        z *= as_column(scale)
    if bias is not None:
        z += bias
    if softcap is None:
        return z, None
    z.div_(softcap).tanh_()
    derivative = (z * z).neg_().add_(1) if need_derivative else None
    return z.mul_(softcap), derivative


def _rows(
    a: Tensor,  # (tile, V) the policy's logits, overwritten
    b: Tensor,  # (tile, V) the reference's logits, overwritten
    targets: Tensor,  # (tile,)
    beta: float,
    derivative: Tensor | None,  # (tile, V) the cap's derivative
    tiles: tuple[Tensor, Tensor] | None,  # (tile, V) each, written; may be a and b
) -> tuple[Tensor, Tensor, Tensor]:  # logp, ref_logp, kl, each (tile,)
    at = targets[:, None]
    ratio = b - a  # exact where the heads nearly agree; once shifted, both are rounded
    (a_top, a_total), (b_top, b_total) = _shift(a), _shift(b)  # (tile, 1)
    ratio.sub_(b_top - a_top).sub_((b_total / a_total).log_())  # log q - log p
    a_total, b_total = a_total.log_(), b_total.log_()
    logp, ref_logp = a.gather(-1, at) - a_total, b.gather(-1, at) - b_total
    p, q = a.sub_(a_total).exp_(), b.sub_(b_total).exp_()
    # log q - log p is NaN where both heads rule a word out: it has no weight there, and may be 0
    larger = torch.maximum(p, q)
    ratio.masked_fill_(larger == 0, 0)
    if is_jsd(beta):
        kl, grad = _jensen_shannon(p, larger, ratio, beta, tiles is not None)
    else:
        kl, grad = _kullback_leibler(p, q, larger, ratio, beta, tiles is not None)
    if tiles is not None and grad is not None:
        first, second = tiles
        p.scatter_(-1, at, logp.expm1())
        if derivative is not None:
            p *= derivative
            grad *= derivative
        second.copy_(grad)
        if first.data_ptr() != p.data_ptr():
            first.copy_(p)
    return logp[:, 0], ref_logp[:, 0], kl[:, 0]


def _kullback_leibler(
    p: Tensor,  # (tile, V)
    q: Tensor,  # (tile, V)
    larger: Tensor,  # (tile, V) of p and q, overwritten
    ratio: Tensor,  # (tile, V) log q - log p, overwritten
    beta: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # KL (tile, 1), its derivative by the policy's logits (tile, V)
    # p - q from the larger of both: p * expm1(ratio) is 0 * inf on a row with extreme logits
    difference = larger.copysign_(ratio).mul_(ratio.abs().neg_().expm1_())
    # the sum of p - q is zero: with it each term is positive, and an error that ratio has all
    # along the row, from the log-sum-exps, cancels
    if beta == REF_POLICY:
        return _weighted(q, ratio).add_(difference).sum(-1, keepdim=True), difference
    kl = _weighted(p, ratio).add_(difference).sum(-1, keepdim=True).neg_()
    return kl, _weighted(p, ratio.add_(kl)).neg_() if need_grad else None


def _jensen_shannon(
    p: Tensor,  # (tile, V)
    larger: Tensor,  # (tile, V) of p and q
    ratio: Tensor,  # (tile, V) log q - log p, overwritten
    beta: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # JSD (tile, 1), its derivative by the policy's logits (tile, V)
    """Sum larger * (c phi(u) - phi(c u)), where phi(x) = (1 + x) log(1 + x).

    u is smaller / larger - 1 and c the smaller one's weight in m, so m / larger is 1 + c u: finite
    for any gap. Each term is positive, and flat where p = q: what errs all along ratio cancels.
    """
    distance = ratio.clamp_(-LARGEST_RATIO, LARGEST_RATIO).abs()
    smaller = distance.neg().exp_()  # relative to the larger
    of_p, of_q = ratio.new_full((), 1 - beta), ratio.new_full((), beta)
    c = torch.where(ratio > 0, of_p, of_q)
    m = torch.where(ratio > 0, of_q, of_p).addcmul_(c, smaller)  # relative to the larger
    m.clamp_(min=torch.finfo(m.dtype).tiny)  # a weight may have been rounded to 0
    # log m = -log1p((1 - m) / m), which has the digits of both ends: m near 1, and m near 0
    log_m = distance.neg().expm1_().mul_(c).div_(m).neg_().log1p_().neg_()
    jsd = smaller.mul_(c).mul_(distance).addcmul_(m, log_m).mul_(larger).sum(-1, keepdim=True)
    jsd.neg_().clamp_(min=0)
    if not need_grad:
        return jsd, None
    log_ratio = log_m.add_(ratio.relu_()).neg_()  # log(p / m)
    mean = (p * log_ratio).sum(-1, keepdim=True)  # KL(p || m)
    return jsd, log_ratio.sub_(mean).mul_(p).mul_(1 - beta)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight * x, but 0 where the weight is 0, for an infinite x too."""
    return (weight * x).masked_fill_(weight == 0, 0)


def _shift(z: Tensor) -> tuple[Tensor, Tensor]:
    """Take each row's maximum off `z` (tile, V) in place; return it and sum exp of the rest."""
    top = z.amax(-1, keepdim=True)
    return top, z.sub_(top).exp().sum(-1, keepdim=True)


KERNELS = LogitKernels(
    forward, recompute, combine, num_state=0,
    fused=lambda dtype, beta: False, second_dtype=lambda dtype, beta: dtype,
)  # fmt: skip
