"""The definition of target_logits, in differentiable PyTorch. Slow, large, and the oracle.

z[m, k] = softcap * tanh((hidden[rows[m]] . weight[targets[m, k]] * scale[m] + bias) / softcap)
"""

import torch
from torch import Tensor

from sepo_kernels.devices import accumulator


def target_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32; may repeat
    targets: Tensor,  # (M, K) int64; -1: absent
    *,
    bias: Tensor | None = None,  # (V,)
    scale: Tensor | float = 1.0,  # or (M,), one a row
    softcap: float | None = None,
) -> Tensor:  # (M, K) float32, or float64 for float64 inputs; -inf where the target is absent
    scale = scale[:, None] if isinstance(scale, Tensor) else scale
    logits = hidden[rows] @ weight.T * scale  # (M, V)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = logits.gather(-1, targets.clamp(min=0)).to(accumulator(logits.dtype))
    return found.masked_fill(targets < 0, -torch.inf)
