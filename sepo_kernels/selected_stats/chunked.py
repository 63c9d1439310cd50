"""selected_stats in plain PyTorch: library GEMMs, and passes over a few rows."""

import torch
from torch import Tensor

from sepo_kernels.scales import Scale
from sepo_kernels.selected_logprob.chunked import capped_logits, log_softmax
from sepo_kernels.selected_logprob_kl.chunked import row_tiles
from sepo_kernels.selected_stats.loops import Rows, StatisticsKernels, dz_at_target


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor | None,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) accumulator dtype: scratch, may be dlogits; or kept
    keep: bool = False,
) -> tuple[Tensor, ...]:  # as StatisticsKernels has it, (chunk,) each
    z, derivative = capped_logits(logits, x, weight, bias, scale, softcap, dlogits is not None)
    found = z.new_empty((KERNELS.numbers, len(targets)))
    for part in row_tiles(z):
        found[:, part] = torch.stack(_numbers(z[part], targets[part]))
    logp, lse, row_scale, *others = found
    if not keep:  # the bits of selected_logprob, whose sums are of all rows at once
        logp, lse, factor = log_softmax(z, targets, derivative, dlogits)
        row_scale = row_scale if dlogits is None else factor
    return logp, lse, row_scale, *others


def gradient(
    logits: Tensor,  # (chunk, columns), capped
    start: int,
    bias: Tensor | None,
    scale: Scale,
    softcap: float | None,
    rows: Rows,
    out: Tensor,  # (chunk, columns), written; may be logits
) -> None:
    for part in row_tiles(logits):
        z, some = logits[part], Rows(*(x[part, None] for x in rows))
        shifted = z - some.reference
        p = shifted.exp().mul_(some.row_scale)
        weight = shifted.add_(some.row_scale.log() + some.entropy).mul_(some.grad_entropy)
        dz = (weight.add_(some.grad_logp) * p).neg_().masked_fill_(p == 0, 0)  # 0 log 0 = 0
        # the target has expm1(logp), which keeps the digits of a confident row
        at = some.targets - start
        inside = (at >= 0) & (at < z.shape[1])
        at = at.clamp(0, z.shape[1] - 1)
        dz.scatter_(-1, at, torch.where(inside, dz_at_target(some), dz.gather(-1, at)))
        if softcap is not None:
            dz *= 1 - (z / softcap) ** 2
        out[part] = dz


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    rows: Rows,
    logits: Tensor,  # (chunk, V) accumulator dtype, scratch; may be out
    out: Tensor,  # (chunk, V), written
) -> None:
    capped_logits(logits, x, weight, bias, scale, softcap, False)
    gradient(logits, 0, None, scale, softcap, rows, out)


def _numbers(
    z: Tensor,  # (tile, V) capped logits
    targets: Tensor,  # (tile,)
) -> tuple[Tensor, ...]:  # as StatisticsKernels has them, (tile,) each
    (top, first), mean_logit = z.max(-1), z.mean(-1)
    shifted = z - top[:, None]
    logp = shifted.gather(-1, targets[:, None])[:, 0]
    # without the largest, whose share is 1: so a confident row keeps the digits of the others
    e = shifted.exp().scatter_(-1, first[:, None], 0)
    others = e.sum(-1)
    total, log_total = 1 + others, others.log1p()
    # both terms of the entropy are positive, because nothing shifted is; finite, so that 0 log 0 = 0
    weighted = shifted.clamp_(min=torch.finfo(z.dtype).min).mul_(e).sum(-1)
    entropy = log_total - weighted / total
    log_sum_sq = e.square_().sum(-1).log1p() - 2 * log_total
    top1 = (first == targets).to(z.dtype)
    return (
        logp - log_total, top + log_total, 1 / total, entropy, log_sum_sq, mean_logit, top1, top,
        log_total,
    )  # fmt: skip


KERNELS = StatisticsKernels(forward, gradient, recompute, fused=lambda dtype: False)
