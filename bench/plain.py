"""The straightforward computation: what a trainer without fused operations writes.

It is a contender, the yardstick of precision, and the truth of whole steps. `product` is torch's
own for the contender; the yardstick takes one that is nowhere slow.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def log_softmax(logits: Tensor) -> Tensor:  # (..., V) -> float32, or float64 of float64
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def of_targets(logp: Tensor, targets: Tensor) -> Tensor:  # (..., V), (...) -> (...)
    return logp.gather(-1, targets[..., None])[..., 0]


def divergence(
    log_p: Tensor,  # (..., V)
    log_q: Tensor,  # (..., V)
    direction: str | tuple[str, float],  # "ref||policy", "policy||ref" or ("jsd", beta)
) -> Tensor:  # (...)
    """KL of policy p and reference q, or their generalised Jensen-Shannon divergence."""
    kl = lambda first, second: (first.exp() * (first - second)).sum(-1)
    if isinstance(direction, str):
        return kl(log_q, log_p) if direction == "ref||policy" else kl(log_p, log_q)
    beta = direction[1]
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # (M, V), (M,) -> (M,) each
    """logp, entropy, log sum p^2, mean logit and log-sum-exp."""
    log_p = log_softmax(logits)
    z = logits.to(log_p.dtype)
    entropy = -(log_p.exp() * log_p).sum(-1)
    squares = (2 * log_p.detach()).logsumexp(-1)
    return of_targets(log_p, targets), entropy, squares, z.mean(-1), z.logsumexp(-1)


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
        return of_targets(log_softmax(product(hidden[rows], weight.T)), targets)
    return log_softmax(product(hidden, weight.T))[rows.long(), targets]


def selected_logprob_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, D)
    ref_weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int32
    targets: Tensor,  # (M,)
    *,
    direction: str | tuple[str, float],  # as of divergence
    gather_first: bool,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor, Tensor, Tensor]:  # logp, ref_logp, kl, (M,) float32 each
    rows = rows.long()
    if gather_first:
        hidden, ref_hidden = hidden[rows], ref_hidden[rows]
        rows = torch.arange(len(rows), device=rows.device)
    log_p = log_softmax(product(hidden, weight.T))  # (N or M, V)
    with torch.no_grad():
        log_q = log_softmax(product(ref_hidden, ref_weight.T))
    kl = divergence(log_p, log_q, direction)
    return log_p[rows, targets], log_q[rows, targets], kl[rows]


def padded(
    pairs: list[Any],  # with tokens of prompt, chosen, rejected
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # tokens and attention mask, (2P, L) int64
    """Each response after its prompt, filled up to the longest; chosen, rejected, chosen, ..."""
    sequences = [np.concatenate([p.prompt, y]) for p in pairs for y in (p.chosen, p.rejected)]
    ids, real = stacked(sequences)
    return ids.to(device), real.long().to(device)


def stacked(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows (B, L) int64 filled up with zeros, and which of their places are not filling."""
    rows = pad_sequence([torch.from_numpy(x).long() for x in sequences], batch_first=True)
    lengths = torch.tensor([*map(len, sequences)])
    return rows, torch.arange(rows.shape[1]) < lengths[:, None]


def vocabulary_logp(
    model: nn.Module, ids: Tensor, attention: Tensor, **options
) -> tuple[Tensor, tuple | None]:  # (2P, L - 1, V) float32; L + 1 states, if asked for
    """By the model's own forward, with the logits of every position but the last."""
    output = model(input_ids=ids, attention_mask=attention, use_cache=False, **options)
    return log_softmax(output.logits[:, :-1]), output.hidden_states


class Step:
    """Forward and backward of a round; without autocast till it is lowered."""

    def __init__(self, forward: Callable, loss: Callable, device: torch.device, bf16: bool):
        self.forward, self.loss = forward, loss  # of a round; of what that gave
        self.device, self.bf16, self.lowered = device, bf16, False

    def lower(self) -> None:
        self.lowered = self.bf16

    def __call__(self, number: int) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lowered):
            found = self.forward(number)
        value = self.loss(found)
        value.backward()
        return value.detach()
