"""Inputs and schedules that the tests of selected_stats share."""

from typing import NamedTuple

import torch
from ops import logprob_cases
from torch import Tensor

from sepo.ops import SelectedStats, explain_selected_stats, selected_stats
from sepo_kernels.selected_stats import IMPLS, reference
from sepo_kernels.selected_stats.layout import EntropyLayout

SHAPES, VARIANTS = logprob_cases.SHAPES, logprob_cases.VARIANTS
make_inputs = logprob_cases.make_inputs


class Way(NamedTuple):
    """A schedule, the leaves that lead there, and whether the entropy is one of the outputs."""

    schedule: str
    leaves: str
    entropy_grad: bool


METRIC = {
    "save": Way("save", "hidden weight bias", False),
    "recompute": Way("recompute", "hidden weight bias", False),
    "frozen_head": Way("frozen_head", "hidden", False),
    "no_grad": Way("no_grad", "", False),
}
ENTROPY = {
    "entropy save": Way("save", "hidden weight bias", True),
    "entropy save frozen": Way("save", "hidden", True),
    "entropy recompute": Way("recompute", "hidden weight bias", True),
    "entropy recompute frozen": Way("recompute", "hidden", True),
}
WAYS = METRIC | ENTROPY
VALUES = SelectedStats._fields


def entropy_layout(V: int, dtype: torch.dtype, impl: str) -> EntropyLayout:
    return EntropyLayout(V, dtype, {i.name: i.fused for i in IMPLS}[impl](dtype))


def budget_for(
    way: str, V: int, dtype=torch.float32, softcap=None, *, impl: str, **_
) -> int | None:
    """Bytes that lead to this schedule with 16 rows or more: 5 rows, or plenty."""
    schedule, _, entropy_grad = WAYS[way]
    if not entropy_grad:
        return logprob_cases.budget_for(schedule, V, dtype, softcap, impl=impl)
    return None if schedule == "save" else 5 * entropy_layout(V, dtype, impl).row_bytes(True)


def run(fn, inputs, *, dtype, way="entropy save", **options) -> dict[str, Tensor]:
    """All statistics, and every gradient of the leaves, by name.

    The upstream gradient of the entropy is that of logp in another order.
    """
    hidden, weight, bias, rows, targets, upstream = inputs
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
    tensors["bias"] = None if bias is None else bias.to(dtype)
    wanted = [name for name in WAYS[way].leaves.split() if tensors[name] is not None]
    leaves = {name: tensors[name].clone().requires_grad_() for name in wanted}
    hidden, weight, bias = (tensors | leaves).values()
    found = dict(zip(VALUES, fn(hidden, weight, rows, targets, bias=bias, **options), strict=True))
    values = {name: x.detach() for name, x in found.items()}
    if not leaves:
        return values
    up = upstream.to(found["logp"].dtype)
    outputs, ups = [found["logp"]], [up]
    if WAYS[way].entropy_grad:
        outputs, ups = [*outputs, found["entropy"]], [up, up.flip(0)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), ups)
    return values | dict(zip(leaves, grads, strict=True))


def ours(inputs, *, dtype, way="entropy save", **options) -> dict[str, Tensor]:
    """`run` of selected_stats, after a check that the call takes its schedule."""
    schedule, _, entropy_grad = WAYS[way]
    M = len(inputs[3])
    if schedule == "recompute" and M == 0:
        schedule = "save"  # a call without rows always fits

    def fn(*args, **kind):
        assert explain_selected_stats(*args, **kind).schedule == schedule
        return selected_stats(*args, **kind)

    options["budget"] = budget_for(way, inputs[1].shape[0], dtype, **options)
    return run(fn, inputs, dtype=dtype, way=way, entropy_grad=entropy_grad, **options)


def of_logits(z, targets, dtype=torch.float32, **options):
    """Statistics of rows (M, V) that are the logits themselves, and what asks for their gradient."""
    M, V = z.shape
    hidden, weight = torch.eye(M).to(dtype), z.T.contiguous().to(dtype).requires_grad_()
    rows = torch.arange(M, dtype=torch.int32)
    return selected_stats(hidden, weight, rows, targets, entropy_grad=True, **options), weight


def truth_of(z, targets):
    eye, rows = torch.eye(len(z)).double(), torch.arange(len(z), dtype=torch.int32)
    return dict(
        zip(VALUES, reference.selected_stats(eye, z.double().T, rows, targets), strict=True)
    )
