"""The logits of K targets a row, beside the head: what _k_targets.py makes log-probabilities of.

Reading order: the function, the autograd Function, the operator boundary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.ops._checks import as_int32, check_index_values, check_scale_values
from sepo_kernels.devices import accumulator
from sepo_kernels.registry import pick
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.target_logits import IMPLS
from sepo_kernels.target_logits.layout import TargetLayout
from sepo_kernels.target_logits.loops import layout_of


class Tapped(NamedTuple):
    """The head as it came in, to be read by what else needs it, and its logits at the targets."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logits: Tensor  # (M, K) accumulator dtype; -inf where a target is absent


def target_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M, K) int64; -1: absent
    scale: Scale,  # a number, or (M,), one a row
    softcap: float | None,
    budget: int | None,  # bytes of gathered rows of the head; None: by device
    impl: str,
) -> Tapped:
    """Return the logits of the targets, differentiable in hidden, weight and bias: 2 M K D FLOP.

    What is returned of the head is the head. Whoever reads it from there hands its gradient to this
    node, which adds its own to it in place: autograd would make a second (V, D) and add the two.
    """
    chosen, _, budget = plan_targets(budget, hidden, weight, targets, impl)
    one, each = scale_arguments(scale)
    args = (hidden, weight, bias, rows, targets, one, softcap, budget, chosen)
    head = (hidden, weight, bias)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)):
        return Tapped(*head, _fwd(*args, scales=each))
    tapped: tuple[Any, ...] = _TargetLogits.apply(*args, each)
    # autograd marks all results alike: what needs no gradient goes on without
    return Tapped(
        tapped[0] if hidden.requires_grad else hidden,
        tapped[1] if weight.requires_grad else weight,
        tapped[2] if bias is not None and bias.requires_grad else bias,
        tapped[3],
    )


class TargetPlan(NamedTuple):
    """How the logits of targets (M, K) are made."""

    impl: str
    layout: TargetLayout
    budget: int  # bytes of gathered rows of the head

    @property
    def peak_bytes(self) -> int:
        """Return the bytes of gathered rows alive at once."""
        return self.layout.peak_bytes(self.budget)


def plan_targets(
    budget: int | None,  # bytes; None: by device
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M, K)
    impl: str,
) -> TargetPlan:
    """Choose the implementation and its budget.

    Raises ValueError for a budget that holds not even one row of the head.
    """
    chosen = pick(IMPLS, impl, hidden, weight)
    layout = layout_of(hidden, targets, chosen.gathers)
    if budget is None:
        budget = layout.default_budget
    elif layout.gathers and budget < layout.entry_bytes:
        raise ValueError(
            "expected a budget of at least one row of the head, "
            f"{layout.entry_bytes} bytes, got {budget}"
        )
    return TargetPlan(chosen.name, layout, budget)


class _TargetLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
        scale: float, softcap: float | None, budget: int, impl: str, scales: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        settings = scale, softcap, budget, impl
        logits = _fwd(hidden, weight, bias, rows, targets, *settings, scales=scales)
        ctx.save_for_backward(scales, hidden, weight, bias, rows, targets, logits)
        ctx.settings = (scale, softcap, budget)
        ctx.impl = impl
        ctx.set_materialize_grads(False)
        return *(None if x is None else x.view_as(x) for x in (hidden, weight, bias)), logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scales, hidden, weight, bias, *others = ctx.saved_tensors
        *beside, grad_logits = grads
        need = ctx.needs_input_grad[:3]
        # of nobody but the node that read the head from here, so it may be added to
        totals = [
            None if not n else torch.zeros_like(x) if g is None else g
            for g, n, x in zip(beside, need, (hidden, weight, bias), strict=True)
        ]
        if grad_logits is not None:
            args = grad_logits, hidden, weight, *others, *ctx.settings, *totals, ctx.impl
            _bwd(*args, scales=scales)
        return *totals, *(None,) * 7


# The operator boundary, as of selected_logprob. The backward adds to the gradients it is given.

torch.library.define(
    "sepo::target_logits_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows, Tensor targets, float scale,"
    " float? softcap, SymInt budget, str impl, *, Tensor? scales=None) -> Tensor",
)
torch.library.define(
    "sepo::target_logits_bwd",
    "(Tensor grad_logits, Tensor hidden, Tensor weight, Tensor rows, Tensor targets, Tensor logits,"
    " float scale, float? softcap, SymInt budget, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight,"
    " Tensor(c!)? grad_bias, str impl, *, Tensor? scales=None) -> ()",
)
_BY_NAME: dict[str, Any] = {impl.name: impl for impl in IMPLS}  # all have a bwd


def check_target_values(
    rows: Tensor,  # (M,)
    targets: Tensor,  # (M, K)
    N: int,
    V: int,
) -> None:
    """Raise ValueError for a value on the CPU that is out of range, and for a row without targets."""
    check_index_values(rows, targets[:0], N, V)
    if targets.device.type != "cpu" or targets.shape[0] == 0:
        return
    low, high = (int(x) for x in targets.aminmax())
    if low < -1 or high >= V:
        raise ValueError(f"expected -1 <= targets < {V}, got {low if low < -1 else high}")
    if low < 0:
        absent = (targets < 0).all(1)
        if absent.any():
            raise ValueError(
                f"expected a target in every row, got none but -1 in row {int(absent.int().argmax())}"
            )


def _run_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor,
    scale: float, *args: Any, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_target_values(rows, targets, hidden.shape[0], weight.shape[0])
    check_scale_values(scales)
    head = (hidden, weight, bias, as_int32(rows), targets)
    # autocast would reach the products inside
    with torch.autocast(hidden.device.type, enabled=False):
        return _BY_NAME[args[-1]].fwd(*head, scale if scales is None else scales, *args[:-1])


def _run_bwd(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor,
    logits: Tensor, scale: float, *args: Any, scales: Tensor | None = None,
) -> None:  # fmt: skip
    head = (grad_logits, hidden, weight, as_int32(rows), targets, logits)
    with torch.autocast(hidden.device.type, enabled=False):
        _BY_NAME[args[-1]].bwd(*head, scale if scales is None else scales, *args[:-1])


def _fake_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, *_: Any,
    **__: Any,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(targets.shape, dtype=accumulator(hidden.dtype))


def _fake_bwd(*_: Any, **__: Any) -> None:
    """Return nothing: the gradients are added to where they lie."""


torch.library.impl("sepo::target_logits_fwd", ("cpu", "cuda"), _run_fwd)
torch.library.impl("sepo::target_logits_bwd", ("cpu", "cuda"), _run_bwd)
torch.library.register_fake("sepo::target_logits_fwd", _fake_fwd)
torch.library.register_fake("sepo::target_logits_bwd", _fake_bwd)
_fwd = torch.ops.sepo.target_logits_fwd.default
_bwd = torch.ops.sepo.target_logits_bwd.default
