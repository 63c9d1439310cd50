"""Inputs and schedules that the tests of selected_logprob_kl share."""

from typing import NamedTuple

import torch
from ops.implementations import on_cpu
from torch import Tensor

from sepo.ops import explain_selected_logprob_kl, selected_logprob_kl
from sepo_kernels.selected_logprob_kl import IMPLS
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

RUNNABLE = on_cpu(IMPLS)

# (N, M, D, D_ref, V): small; ragged in every dimension; no rows; rows repeat, N < M; real
# vocabularies, which go over several chunks of columns
SHAPES = [
    (32, 16, 32, 32, 64),
    (37, 23, 45, 29, 101),
    (8, 0, 16, 24, 31),
    (4, 40, 16, 8, 31),
    (9, 20, 24, 16, 50257),
    (19, 20, 3, 5, 128256),
]
VARIANTS = {
    "plain": dict(bias=False),
    "bias": dict(bias=True),
    "scaled": dict(bias=False, scale=0.25),
    "capped": dict(bias=False, softcap=5.0),
    "all": dict(bias=True, scale=0.7, softcap=3.0),
    "own": dict(bias=True, scale=0.7, softcap=3.0, ref_scale=0.5, ref_softcap=4.0),
    "reference capped": dict(bias=False, ref_softcap=2.0),
    "policy capped": dict(bias=False, softcap=4.0, ref_scale=0.5, ref_softcap=torch.inf),
}
# what selected_logprob_kl is to take, and the leaves that lead there
SCHEDULES = {
    "save": ("save", "hidden weight bias"),
    "save frozen": ("save", "hidden"),
    "recompute": ("recompute", "hidden weight bias"),
    "frozen_head": ("frozen_head", "hidden"),
    "no_grad": ("no_grad", ""),
}
DIRECTIONS = ["ref||policy", "policy||ref"]


class Inputs(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    ref_hidden: Tensor  # (N, D_ref)
    ref_weight: Tensor  # (V, D_ref)
    ref_bias: Tensor | None  # (V,)
    rows: Tensor  # (M,)
    targets: Tensor  # (M,)
    upstream: Tensor  # (2, M): of logp, of kl

    def to(self, dtype) -> "Inputs":
        cast = [x.to(dtype) if x is not None else None for x in self[:6]]
        return Inputs(*cast, *self[6:])

    def call(self, fn, **options):
        return fn(
            self.hidden, self.weight, self.ref_hidden, self.ref_weight, self.rows, self.targets,
            bias=self.bias, ref_bias=self.ref_bias, **options,
        )  # fmt: skip


def make_inputs(N, M, D, D_ref, V, *, dtype=torch.float32, bias=False, seed=0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    hidden, ref_hidden = normal(N, D), normal(N, D_ref)
    weight, ref_weight = normal(V, D) * 2 / D**0.5, normal(V, D_ref) * 2 / D_ref**0.5
    offset, ref_offset = (normal(V), normal(V)) if bias else (None, None)
    rows = torch.randint(N, (M,), generator=g, dtype=torch.int32)
    targets = torch.randint(V, (M,), generator=g)
    tensors = hidden, weight, offset, ref_hidden, ref_weight, ref_offset
    return Inputs(*tensors, rows, targets, normal(2, M)).to(dtype)


def budget_for(schedule: str, V: int, dtype=torch.float32) -> int | None:
    """Bytes that lead to `schedule` with 16 rows or more: 5 rows, or plenty."""
    if schedule.startswith("save"):
        return None
    return 5 * TwoHeadLayout(V, dtype, dtype, fused=False).row_bytes(gradient=True)


def run(fn, inputs: Inputs, *, schedule="save", dtype=None, **options) -> dict[str, Tensor]:
    """logp, ref_logp, kl and every gradient that the schedule has, by name."""
    inputs = inputs if dtype is None else inputs.to(dtype)
    wanted = SCHEDULES[schedule][1].split()
    leaves = {
        name: getattr(inputs, name).clone().requires_grad_()
        for name in wanted
        if getattr(inputs, name) is not None
    }
    logp, ref_logp, kl = inputs._replace(**leaves).call(fn, **options)
    found = {"logp": logp.detach(), "ref_logp": ref_logp.detach(), "kl": kl.detach()}
    if leaves:
        upstream = tuple(inputs.upstream.to(logp.dtype))
        grads = torch.autograd.grad((logp, kl), list(leaves.values()), upstream)
        found |= dict(zip(leaves, grads, strict=True))
    return found


def checked(schedule: str, M: int):
    """selected_logprob_kl, after a check that the call takes `schedule`."""
    expected = SCHEDULES[schedule][0]
    if M == 0 and expected != "no_grad":
        expected = "save"  # a call without rows always fits

    def fn(*args, **options):
        assert explain_selected_logprob_kl(*args, **options).schedule == expected
        return selected_logprob_kl(*args, **options)

    return fn
