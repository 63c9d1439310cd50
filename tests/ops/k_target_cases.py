"""Inputs of K targets a row, and the dense formulas that they are held against."""

import torch
from ops import logprob_cases
from torch import Tensor

from sepo.ops import selected_logprob

# (N, M, D, V, K): small; ragged, rows repeat; K beyond V; no rows; a real vocabulary
SHAPES = [(32, 16, 32, 64, 4), (7, 23, 45, 101, 3), (5, 6, 12, 9, 20), (8, 0, 16, 31, 5)]
LARGE = (9, 15, 24, 50257, 20)
OVER = ["vocabulary", "targets"]


def make_inputs(N, M, D, V, K, *, dtype=torch.float32, bias=False, seed=0):
    """hidden, weight, bias or None, rows, targets (M, K) with repeated and absent ones, upstream."""
    hidden, weight, offset, rows, _, _ = logprob_cases.make_inputs(
        N, M, D, V, dtype=dtype, bias=bias, seed=seed
    )
    g = torch.Generator().manual_seed(seed + 1)
    targets = torch.randint(V, (M, K), generator=g)
    targets[:, 1::3] = targets[:, 0:-1:3]  # twice in a row
    targets[torch.rand(M, K, generator=g) < 0.2] = -1
    at = torch.randint(K, (M,), generator=g)
    targets[torch.arange(M), at] = torch.randint(V, (M,), generator=g)  # one at least is present
    return hidden, weight, offset, rows, targets, torch.randn(M, K, generator=g)


def dense(
    hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, over="vocabulary", bias=None,
    scale=1.0, softcap=None,
) -> Tensor:  # fmt: skip
    """(M, K) by the logits of all rows, of all the vocabulary."""
    z = hidden[rows] @ weight.T * scale
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    absent = targets < 0
    if over == "vocabulary":
        return z.log_softmax(-1).gather(-1, targets.clamp(min=0)).masked_fill(absent, 0)
    own = z.gather(-1, targets.clamp(min=0)).masked_fill(absent, -torch.inf)
    return own.log_softmax(-1).masked_fill(absent, 0)


def run(fn, inputs, *, dtype, schedule="save", **options) -> dict[str, Tensor]:
    """logp and every gradient that the schedule has, by name; over="targets" has one schedule."""
    return logprob_cases.run(fn, inputs, dtype=dtype, schedule=schedule, **options)


def ours(inputs, *, impl, schedule="save", dtype=torch.float32, softcap=None, **options):
    budget = logprob_cases.budget_for(
        schedule, len(inputs[1]), dtype, impl=impl, softcap=softcap
    )  # of the vocabulary's logits; rows of the head are smaller
    if budget is not None:
        budget = max(budget, 2 * inputs[0].shape[1] * 6)
    options |= dict(impl=impl, budget=budget, softcap=softcap)
    return run(selected_logprob, inputs, dtype=dtype, schedule=schedule, **options)
