"""The definition of selected_logprob, in differentiable PyTorch. Slow, large, and the oracle.

logp[m] = z[m, targets[m]] - logsumexp(z[m, :])
z       = softcap * tanh((hidden[rows] @ weight.T * scale + bias) / softcap)
"""

import torch
from torch import Tensor

from sepo_kernels.devices import accumulator
from sepo_kernels.scales import Scale, as_column


def selected_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32; may repeat: a shared prompt's last row predicts both responses
    targets: Tensor,  # (M,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    scale: Scale = 1.0,  # a number, or (M,), one a row
    softcap: float | None = None,  # None: logits are not capped
) -> Tensor:  # (M,) float32, or float64 for float64 inputs
    logits = capped_logits(hidden, weight, rows, bias, scale, softcap)
    return logits.to(accumulator(logits.dtype)).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def capped_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,)
    bias: Tensor | None,  # (V,)
    scale: Scale,
    softcap: float | None,
) -> Tensor:  # (M, V)
    """Return z."""
    logits = hidden[rows] @ weight.T * as_column(scale)
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
