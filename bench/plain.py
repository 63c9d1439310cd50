"""What a trainer without fused operations writes: the contender, and the yardstick of precision.

`product` is torch's own for the contender; the yardstick takes one that is nowhere slow.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def selected_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,)
    *,
    gather_first: bool,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:  # (M,) float32
    if gather_first:
        logp = product(hidden[rows], weight.T).float().log_softmax(-1)  # (M, V)
        return logp.gather(-1, targets[:, None])[:, 0]
    logp = product(hidden, weight.T).float().log_softmax(-1)  # (N, V)
    return logp[rows.long(), targets]


def selected_logprob_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, D)
    ref_weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,)
    *,
    direction: str,  # "ref||policy" | "policy||ref"
    gather_first: bool,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor, Tensor, Tensor]:  # logp, ref_logp, kl, (M,) float32 each
    rows = rows.long()
    if gather_first:
        hidden, ref_hidden, rows = (
            hidden[rows],
            ref_hidden[rows],
            torch.arange(len(rows), device=rows.device),
        )
    log_p = product(hidden, weight.T).float().log_softmax(-1)  # (N or M, V)
    with torch.no_grad():
        log_q = product(ref_hidden, ref_weight.T).float().log_softmax(-1)
    if direction == "ref||policy":
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return log_p[rows, targets], log_q[rows, targets], kl[rows]
