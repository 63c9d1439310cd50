"""selected_logprob in plain PyTorch: library GEMMs, and passes over one buffer.

The target's entry of dlogits is expm1(logp), not p - 1: a confident row keeps its relative
precision when dlogits is rounded to bfloat16.
"""

import torch
from torch import Tensor

from sepo_kernels import gemm
from sepo_kernels.scales import Scale, as_column
from sepo_kernels.selected_logprob.loops import LogitKernels


def forward(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor | None,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) accumulator dtype, scratch; may be dlogits
) -> tuple[Tensor, Tensor, Tensor]:  # logp, lse, row_scale, each (chunk,)
    z, derivative = capped_logits(logits, x, weight, bias, scale, softcap, dlogits is not None)
    return log_softmax(z, targets, derivative, dlogits)


def log_softmax(
    z: Tensor,  # (chunk, V) capped logits, overwritten
    targets: Tensor,  # (chunk,)
    derivative: Tensor | None,  # (chunk, V) the cap's
    dlogits: Tensor | None,  # (chunk, V), written; may be z
) -> tuple[Tensor, Tensor, Tensor]:  # logp, lse, row_scale, each (chunk,)
    at = targets[:, None]
    top = z.amax(-1, keepdim=True)
    target = z.gather(-1, at) - top
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    log_total = total.log()
    logp = target - log_total
    if dlogits is not None:
        _write_dlogits(dlogits, z.div_(total), at, logp, derivative)
    return logp[:, 0], (top + log_total)[:, 0], torch.ones_like(logp[:, 0])


def recompute(
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (chunk,)
    scale: Scale,
    softcap: float | None,
    dlogits: Tensor,  # (chunk, V), written
    logits: Tensor,  # (chunk, V) accumulator dtype, scratch; may be dlogits
    logp: Tensor,  # (chunk,)
    lse: Tensor,  # (chunk,)
) -> Tensor:  # row_scale (chunk,)
    z, derivative = capped_logits(logits, x, weight, bias, scale, softcap, True)
    p = z.sub_(lse[:, None]).exp_()
    _write_dlogits(dlogits, p, targets[:, None], logp[:, None], derivative)
    return torch.ones_like(logp)


def capped_logits(
    out: Tensor,  # (chunk, V), written
    x: Tensor,  # (chunk, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
    need_derivative: bool,
) -> tuple[Tensor, Tensor | None]:  # out, the cap's derivative there (chunk, V) if needed
    gemm.logits(out, x, weight)
    if isinstance(scale, Tensor) or scale != 1.0:
        out *= as_column(scale)
    if bias is not None:
        out += bias
    if softcap is None:
        return out, None
    out.div_(softcap).tanh_()
    derivative = (out * out).neg_().add_(1) if need_derivative else None
    return out.mul_(softcap), derivative


def _write_dlogits(
    dlogits: Tensor,  # (chunk, V), written; may be p
    p: Tensor,  # (chunk, V) probabilities, overwritten
    targets: Tensor,  # (chunk, 1)
    logp: Tensor,  # (chunk, 1)
    derivative: Tensor | None,  # (chunk, V)
) -> None:
    p.scatter_(-1, targets, logp.expm1())
    if derivative is not None:
        p.mul_(derivative)
    if dlogits is not p:
        dlogits.copy_(p)


KERNELS = LogitKernels(forward, recompute, fused=lambda dtype: False)
