"""The definition of selected_logprob_kl, in differentiable PyTorch. Slow, large, and the oracle.

p, q    = softmax of the policy's and of the reference's capped logits at each row
logp    = log p[target],  ref_logp = log q[target]
kl      = sum_v q (log q - log p)  for "ref||policy",  sum_v p (log p - log q)  for "policy||ref",
          beta sum_v q (log q - log m) + (1 - beta) sum_v p (log p - log m)  for ("jsd", beta),
          with m = (1 - beta) p + beta q
"""

import math

import torch
from torch import Tensor

from sepo_kernels.devices import accumulator
from sepo_kernels.scales import Scale, as_column


def selected_logprob_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, D_ref), no gradient
    ref_weight: Tensor,  # (V, D_ref), no gradient
    rows: Tensor,  # (M,) int32, may repeat
    targets: Tensor,  # (M,) int64
    *,
    direction: str | tuple[str, float] = "ref||policy",  # or "policy||ref", or ("jsd", beta)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,), no gradient
    scale: Scale = 1.0,  # a number, or (M,), one a row
    softcap: float | None = None,
    ref_scale: Scale | None = None,  # None: the policy's
    ref_softcap: float | None = None,  # None: the policy's; inf: none
) -> tuple[Tensor, Tensor, Tensor]:  # logp, ref_logp, kl, each (M,) float32 or float64
    log_p = _log_softmax(hidden, weight, bias, rows, scale, softcap)
    ref_scale = scale if ref_scale is None else ref_scale
    ref_softcap = softcap if ref_softcap is None else ref_softcap
    with torch.no_grad():
        log_q = _log_softmax(ref_hidden, ref_weight, ref_bias, rows, ref_scale, ref_softcap)
    if direction == "ref||policy":
        kl = _divergence(log_q, log_p)
    elif direction == "policy||ref":
        kl = _divergence(log_p, log_q)
    else:
        beta = float(direction[1])
        log_m = _mixture(log_p, log_q, beta)
        kl = beta * _divergence(log_q, log_m) + (1 - beta) * _divergence(log_p, log_m)
    at = targets[:, None]
    return log_p.gather(-1, at)[:, 0], log_q.gather(-1, at)[:, 0], kl


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:  # (M, V) each -> (M,)
    """sum p (log p - log q); 0 where p is 0, whatever q is: two heads may both rule a word out."""
    none = log_p == -torch.inf
    ratio = log_p.masked_fill(none, 0) - log_q.masked_fill(none, 0)
    return (log_p.exp() * ratio).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:  # (M, V) each
    """log((1 - beta) p + beta q); any number, without a gradient, where both rule a word out."""
    none = (log_p == -torch.inf) & (log_q == -torch.inf)
    own = log_p.masked_fill(none, 0) + math.log1p(-beta)
    return torch.logaddexp(own, log_q.masked_fill(none, 0) + math.log(beta))


def _log_softmax(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,)
    scale: Scale,
    softcap: float | None,
) -> Tensor:  # (M, V)
    logits = hidden[rows] @ weight.T * as_column(scale)
    if bias is not None:
        logits = logits + bias
    if softcap is not None and softcap != torch.inf:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.to(accumulator(logits.dtype)).log_softmax(-1)
