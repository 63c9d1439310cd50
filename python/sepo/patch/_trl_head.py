"""The function of tensors that stands where TRL has its head's."""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import sepo.ops as ops
from sepo.errors import InputError
from sepo.model.forward import Head, under_autocast

entropy_is_rewarded = ContextVar("entropy_is_rewarded", default=False)


class Statistics(NamedTuple):
    """Hold what TRL's head returns of every label; None is what nobody asked for."""

    logp: Tensor  # (M,) float32 nats
    entropy: Tensor | None  # (M,) float32 nats, differentiable
    log_sum_sq: Tensor | None  # (M,) float32, log of the sum of squared probabilities
    mean_logit: Tensor | None  # (M,) float32
    top1: Tensor | None  # (M,) bool


class LabelStatistics:
    """Stand where TRL has its autograd function; its `apply` takes and returns the same."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (M, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (M,) int64
        temperature: float,
        chunk_size: int,  # of TRL's loop; ours has a budget
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Statistics:
        """Return log-probabilities of the targets, and of the statistics those named in `outputs`."""
        refuse_zero3()
        own = Head(weight, bias, logit_scale, final_logit_softcapping)
        hidden, (weight, bias, scale, softcap) = head_of(hidden, own, temperature)
        rows = torch.arange(len(targets), dtype=torch.int32, device=targets.device)
        head = hidden, weight, rows, targets
        logits: dict[str, Any] = dict(bias=bias, scale=scale, softcap=softcap)
        if not {*outputs} - {"log_probs"}:
            return Statistics(ops.selected_logprob(*head, **logits).float(), *(None,) * 4)
        rewarded = entropy_is_rewarded.get()
        found = ops.selected_stats(*head, entropy_grad=rewarded, **logits)
        entropy = found.entropy
        if "entropy" in outputs and not rewarded:
            entropy = _EntropyLater.apply(*head, bias, scale, softcap, entropy)
        given = lambda name, value: value if name in outputs else None
        return Statistics(
            found.logp.float(),
            given("entropy", entropy.float()),
            given("log_sum_sq_probs", found.log_sum_sq.float()),
            given("mean_logits", found.mean_logit.float()),
            given("is_top1", found.top1),
        )


class _EntropyLater(torch.autograd.Function):
    """Give the entropy a gradient that is computed where one arrives: mostly it is a metric."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor,
        bias: Tensor | None, scale: float, softcap: float | None, entropy: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows, targets)
        ctx.settings = dict(scale=scale, softcap=softcap, entropy_grad=True)
        return entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *head, rows, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        leaves: list[Any] = [  # a bias may be None
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(head, needed, strict=True)
        ]
        hidden, weight, bias = leaves
        with torch.enable_grad():
            found = ops.selected_stats(hidden, weight, rows, targets, bias=bias, **ctx.settings)
        found.entropy.backward(grad)
        grads = [None if x is None else x.grad for x in leaves]
        return *grads[:2], None, None, grads[2], None, None, None


def head_of(
    hidden: Tensor,  # (M, D)
    own: Head,
    temperature: float,
) -> tuple[Tensor, Head]:
    """Return states and head at a temperature, as our operations take them: in one dtype."""
    hidden, own = under_autocast(hidden, _at(temperature, own))
    bias = None if own.bias is None else own.bias.to(hidden.dtype)
    return hidden, own._replace(weight=own.weight.to(hidden.dtype), bias=bias)


def refuse_zero3() -> None:
    """Raise InputError under DeepSpeed ZeRO-3."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError("sepo.patch.trl: expected whole weights, got DeepSpeed ZeRO-3's shards")


def _at(temperature: float, own: Head) -> Head:
    """Say TRL's cap((h W + bias) scale) / temperature as a head: its scale leaves the bias alone."""
    factor, bias, softcap = own.scale / temperature, own.bias, own.softcap
    if bias is not None and factor != 1:
        bias = bias * factor
    return Head(own.weight, bias, factor, None if softcap is None else softcap / temperature)
