"""Inputs and schedules that the tests of selected_logprob share."""

import torch
from torch import Tensor

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels.selected_logprob import IMPLS
from sepo_kernels.selected_logprob.layout import HeadLayout

# (N, M, D, V): small; ragged in every dimension; no rows; rows repeat, N < M; real vocabularies
SHAPES = [
    (32, 16, 32, 64),
    (37, 23, 45, 101),
    (8, 0, 16, 31),
    (4, 40, 16, 31),
    (9, 15, 24, 50257),
    (19, 15, 3, 128256),
]
VARIANTS = {
    "plain": dict(bias=False),
    "bias": dict(bias=True),
    "scaled": dict(bias=False, scale=0.25),
    "capped": dict(bias=False, softcap=5.0),
    "all": dict(bias=True, scale=0.7, softcap=3.0),
}
SCHEDULES = ["save", "recompute", "frozen_head", "no_grad"]
NAMES = ("hidden", "weight", "bias")


def make_inputs(N, M, D, V, *, dtype=torch.float32, bias=False, seed=0):
    """hidden (N, D), weight (V, D), bias (V,) or None, rows (M,), targets (M,), upstream (M,)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * 2 / D**0.5).to(dtype)
    offset = torch.randn(V, generator=g).to(dtype) if bias else None
    rows = torch.randint(N, (M,), generator=g, dtype=torch.int32)
    targets = torch.randint(V, (M,), generator=g)
    upstream = torch.randn(M, generator=g)
    return hidden, weight, offset, rows, targets, upstream


def layout(V: int, dtype: torch.dtype, softcap: float | None, impl: str) -> HeadLayout:
    fused = {i.name: i.fused for i in IMPLS}[impl](dtype)
    return HeadLayout(V, dtype, softcap is not None, fused)


def budget_for(
    schedule: str, V: int, dtype=torch.float32, softcap=None, *, impl: str, **_
) -> int | None:
    """Bytes that lead to `schedule` when everything needs a gradient: 5 rows, or plenty.

    Not fewer: MKL's products of 3 rows and 50 257 columns are a digit less accurate.
    """
    if schedule == "save":
        return None
    return 5 * layout(V, dtype, softcap, impl).row_bytes(gradient=True)


def run(fn, inputs, *, dtype, schedule="save", **options) -> dict[str, Tensor]:
    """logp and every gradient that the schedule has, by name."""
    hidden, weight, bias, rows, targets, upstream = inputs
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    leaves = {}
    if schedule != "no_grad":
        leaves["hidden"] = hidden = hidden.clone().requires_grad_()
    if schedule in ("save", "recompute"):
        leaves["weight"] = weight = weight.clone().requires_grad_()
        if bias is not None:
            leaves["bias"] = bias = bias.clone().requires_grad_()
    logp = fn(hidden, weight, rows, targets, bias=bias, **options)
    found = {"logp": logp.detach()}
    if leaves:
        grads = torch.autograd.grad(logp, list(leaves.values()), upstream.to(logp.dtype))
        found |= dict(zip(leaves, grads, strict=True))
    return found


def checked(schedule: str, M: int):
    """selected_logprob, after a check that the call takes `schedule`."""

    def fn(*args, **options):
        # a call without rows always fits
        expected = "save" if schedule == "recompute" and M == 0 else schedule
        assert explain_selected_logprob(*args, **options).schedule == expected
        return selected_logprob(*args, **options)

    return fn
