"""The definition of selected_stats, in differentiable PyTorch. Slow, large, and the oracle.

p          = softmax of the capped logits z of selected_logprob
logp       = log p[target]
entropy    = -sum_v p log p, 0 where p is 0
log_sum_sq = log sum_v p^2
mean_logit = mean_v z
lse        = log sum_v e^z
top1       = the target is the first of the largest logits
"""

import torch
from torch import Tensor

from sepo_kernels.devices import accumulator
from sepo_kernels.scales import Scale
from sepo_kernels.selected_logprob.reference import capped_logits


def selected_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32; may repeat
    targets: Tensor,  # (M,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    scale: Scale = 1.0,  # a number, or (M,), one a row
    softcap: float | None = None,
) -> tuple[Tensor, ...]:  # logp, entropy, log_sum_sq, mean_logit, lse, top1, each (M,)
    z = capped_logits(hidden, weight, rows, bias, scale, softcap)
    z = z.to(accumulator(z.dtype))
    log_p = z.log_softmax(-1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0)  # 0 log 0 = 0
    return (
        log_p.gather(-1, targets[:, None])[:, 0],
        -(log_p.exp() * finite).sum(-1),
        (2 * log_p).logsumexp(-1),
        z.mean(-1),
        z.logsumexp(-1),
        z.argmax(-1) == targets,
    )
