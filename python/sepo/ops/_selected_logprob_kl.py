"""selected_logprob_kl: log-probabilities of chosen tokens under two heads, and the KL between them.

Reading order: the public functions, their checks, the autograd Function, the operator boundary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sepo.ops._checks import (
    as_int32,
    check_head,
    check_index_values,
    check_indices,
    check_one_device,
    check_reverse_mode,
    check_scale,
    check_scale_values,
    check_softcap,
)
from sepo.ops._selected_logprob import (
    Explanation,
    explanation,
    fake_gradients,
    needs_grad,
    out_of_memory,
    schedule_within,
)
from sepo_kernels import schedules
from sepo_kernels.registry import pick
from sepo_kernels.scales import Scale, scale_arguments
from sepo_kernels.selected_logprob_kl import IMPLS
from sepo_kernels.selected_logprob_kl.layout import DIRECTIONS, JSD
from sepo_kernels.selected_logprob_kl.loops import outputs


class LogprobKL(NamedTuple):
    """Name the results of `selected_logprob_kl`, each (M,) float32 nats, or float64.

    Attributes:
        logp: log-probability of the target under the policy.
        ref_logp: the same under the reference, without a gradient.
        kl: divergence of the two distributions, the one that was asked for.
    """

    logp: Tensor  # (M,)
    ref_logp: Tensor  # (M,)
    kl: Tensor  # (M,)


def selected_logprob_kl(
    hidden: Tensor,  # (N, D) after the final norm
    weight: Tensor,  # (V, D), same dtype as hidden
    ref_hidden: Tensor,  # (N, D_ref), same dtype; D_ref may differ from D
    ref_weight: Tensor,  # (V, D_ref), same dtype
    rows: Tensor,  # (M,) int32 or int64, 0 <= rows < N, may repeat
    targets: Tensor,  # (M,) int64, 0 <= targets < V
    *,
    direction: str | tuple[str, float] = "ref||policy",  # or "policy||ref", or ("jsd", beta)
    bias: Tensor | None = None,  # (V,), same dtype as hidden
    ref_bias: Tensor | None = None,  # (V,), same dtype as hidden
    scale: Scale = 1.0,  # multiplies the logits before the bias: a number, or (M,), one a row
    softcap: float | None = None,  # logits = softcap * tanh(logits / softcap)
    ref_scale: Scale | None = None,  # the reference head's own; None: the policy's
    ref_softcap: float | None = None,  # the reference head's own; None: the policy's; inf: none
    budget: int | None = None,  # bytes of logits or probabilities alive at once; None: by device
    impl: str = "auto",
) -> LogprobKL:  # logp, ref_logp, kl, each (M,) float32 nats, or float64
    """Return both heads' log p(targets[m]) and their divergence at each row, and no (N, V) tensor.

    With p the policy's distribution over the vocabulary and q the reference's, "ref||policy" is
    sum q (log q - log p), the sequence KL of TDPO (arXiv 2404.11999) eq. 8 token by token,
    "policy||ref" is sum p (log p - log q). ("jsd", beta) is beta KL(q || m) + (1 - beta) KL(p || m)
    with m = (1 - beta) p + beta q, the generalised Jensen-Shannon divergence of GKD
    (arXiv 2306.13649) eq. 1, its P the reference. It is at most log 2. Towards beta = 0 it becomes
    beta times "ref||policy", towards 1 it becomes (1 - beta) times "policy||ref"; at both it is 0,
    and they are refused. On a CPU whose kernel of bfloat16 heads keeps its logits in cache, "chunked"
    takes bfloat16, because that kernel has no such divergence.

    Gradients reach hidden, weight and bias, through logp and kl; ref_logp carries none. Index
    values, schedules, budget, autocast, precision and `retain_graph` are as for `selected_logprob`;
    `explain_selected_logprob_kl` tells what runs.

    Args:
        hidden: (N, D) floating point with contiguous rows, the policy's states after its norm.
        weight: (V, D) with contiguous rows, the policy's head, in the dtype of hidden.
        ref_hidden: (N, D_ref), the reference's states, in the dtype of hidden.
        ref_weight: (V, D_ref), the reference's head, in the dtype of hidden.
        rows: (M,) int32 or int64, 0 <= rows < N, may repeat: the states that predict.
        targets: (M,) int64, 0 <= targets < V: the token ids that they predict.
        direction: "ref||policy", "policy||ref", or ("jsd", beta) with 0 < beta < 1.
        bias: (V,) of the policy's head, in the dtype of hidden.
        ref_bias: (V,) of the reference's head, in the dtype of hidden.
        scale: multiplies the logits before the bias: a number other than 0, or (M,), one a row, as
            for `selected_logprob`.
        softcap: logits = softcap * tanh(logits / softcap); None: not.
        ref_scale: of the reference's head: a number above 0, or (M,); None: the policy's.
        ref_softcap: of the reference's head; None: the policy's; math.inf: none, whatever the
            policy has.
        budget: bytes of logits or probabilities alive at once; None: by device.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        LogprobKL: logp, ref_logp, kl, each (M,) float32 nats, or float64 for float64 inputs.

    Raises:
        ValueError: for shapes, strides, dtypes or devices that do not fit, an unknown direction, a
            beta outside (0, 1), a scale of 0, a ref_scale of 0 or less, indices on the CPU out of
            range, a budget that holds not even one row or is more than the GPU's memory, and an
            `impl` that is unknown or cannot run.
        torch.OutOfMemoryError: as `selected_logprob`.
        NotImplementedError: as `selected_logprob`.
    """
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    _check(*heads, rows, targets, scale, softcap, ref_scale, ref_softcap)
    beta = _beta(direction)
    check_reverse_mode("selected_logprob_kl", hidden, weight, bias)
    chosen = pick(IMPLS, impl, hidden, weight, beta)
    layout, need = chosen.kernels.layout_of(hidden, weight, beta), needs_grad(hidden, weight, bias)
    schedule, budget = schedule_within(budget, rows.shape[0], layout, hidden.device, need)
    one, each = scale_arguments(scale)
    # Dynamo takes no tensor twice: the policy's is told by its absence
    ref_one, ref_each = scale_arguments(None if ref_scale is scale else ref_scale)
    if ref_softcap is None or ref_softcap == math.inf:
        ref_softcap = softcap if ref_softcap is None else None
    settings = (one, softcap, ref_one, ref_softcap, beta, schedule, budget)
    args = (*heads, rows, targets, *settings, chosen.name)
    if schedule == schedules.NO_GRAD:
        return LogprobKL(*_fwd(*args, scales=each, ref_scales=ref_each)[:3])
    return LogprobKL(*_SelectedLogprobKL.apply(*args, each, ref_each))


def explain_selected_logprob_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M,) int64
    *,
    direction: str | tuple[str, float] = "ref||policy",
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    scale: Scale = 1.0,  # a number, or (M,)
    softcap: float | None = None,
    ref_scale: Scale | None = None,
    ref_softcap: float | None = None,
    budget: int | None = None,  # bytes
    impl: str = "auto",
) -> Explanation:
    """Return the schedule that `selected_logprob_kl` takes for the same arguments; computes nothing.

    Grad mode and `requires_grad` are read now. `gemms` counts products of either width alike.

    Args:
        hidden: (N, D) floating point, the policy's states after the final norm.
        weight: (V, D), the policy's head, in the dtype of hidden.
        ref_hidden: (N, D_ref), the reference's states, in the dtype of hidden.
        ref_weight: (V, D_ref), the reference's head, in the dtype of hidden.
        rows: (M,) int32 or int64, the states that predict.
        targets: (M,) int64, the token ids that they predict.
        direction: "ref||policy", "policy||ref", or ("jsd", beta) with 0 < beta < 1.
        bias: (V,) of the policy's head, in the dtype of hidden.
        ref_bias: (V,) of the reference's head, in the dtype of hidden.
        scale: multiplies the logits before the bias: a number other than 0, or (M,).
        softcap: of the logits; None: not.
        ref_scale: of the reference's head: a number above 0, or (M,); None: the policy's.
        ref_softcap: of the reference's head; None: the policy's; math.inf: none.
        budget: bytes of logits or probabilities alive at once; None: by device.
        impl: "auto", or a name of an implementation: "native", "triton", "chunked".

    Returns:
        Explanation: implementation, schedule, sizes in rows and bytes, GEMMs, and reasons.

    Raises:
        ValueError: as `selected_logprob_kl`, but for index values, which are not read.
    """
    heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    _check(*heads, rows, targets, scale, softcap, ref_scale, ref_softcap)
    beta = _beta(direction)
    chosen = pick(IMPLS, impl, hidden, weight, beta)
    layout = chosen.kernels.layout_of(hidden, weight, beta)
    need = needs_grad(hidden, weight, bias)
    return explanation(chosen.name, layout, hidden, len(rows), budget, need)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    scale: Scale,
    softcap: float | None,
    ref_scale: Scale | None,
    ref_softcap: float | None,
) -> None:
    check_head(hidden, weight, bias)
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    if ref_hidden.shape[0] != hidden.shape[0] or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            "expected ref_hidden (N, D_ref) and ref_weight (V, D_ref) with "
            f"N = {hidden.shape[0]} and V = {weight.shape[0]}, "
            f"got {tuple(ref_hidden.shape)} and {tuple(ref_weight.shape)}"
        )
    if ref_hidden.dtype != hidden.dtype:
        raise ValueError(f"expected ref_hidden in {hidden.dtype}, got {ref_hidden.dtype}")
    check_indices(rows, targets)
    check_one_device(hidden, weight, ref_hidden, ref_weight, rows, targets, bias, ref_bias)
    check_softcap(softcap)
    check_softcap(ref_softcap, prefix="ref_")
    check_scale(scale, rows, hidden)
    if not isinstance(scale, Tensor) and scale == 0:  # the bias gradient is found by dividing by it
        raise ValueError(f"expected a scale other than 0, got {scale}")
    if isinstance(ref_scale, Tensor):
        check_scale(ref_scale, rows, hidden, prefix="ref_")
    elif ref_scale is not None and not 0 < ref_scale < math.inf:
        raise ValueError(f"expected a ref_scale above 0 or None, got {ref_scale}")


def _beta(direction: str | tuple[str, float]) -> float:
    """Return the divergence as the kernels take it: the reference's weight in the mixture."""
    if isinstance(direction, str) and direction in DIRECTIONS:
        return DIRECTIONS[direction]
    if not (isinstance(direction, tuple) and len(direction) == 2 and direction[0] == JSD):
        got = f'"{direction}"' if isinstance(direction, str) else repr(direction)
        raise ValueError(
            f'expected direction "ref||policy", "policy||ref" or ("jsd", beta), got {got}'
        )
    beta = direction[1]
    if not (isinstance(beta, int | float) and 0 < beta < 1):
        raise ValueError(f'expected 0 < beta < 1 in direction ("jsd", beta), got {beta!r}')
    return beta


class _SelectedLogprobKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor,
        ref_weight: Tensor, ref_bias: Tensor | None, rows: Tensor, targets: Tensor, scale: float,
        softcap: float | None, ref_scale: float | None, ref_softcap: float | None, beta: float,
        schedule: str, budget: int, impl: str, scales: Tensor | None, ref_scales: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ref: tuple[Tensor | None, ...] = (ref_hidden, ref_weight, ref_bias)
        settings = (scale, softcap, ref_scale, ref_softcap, beta, schedule, budget)
        each: dict[str, Tensor | None] = {"scales": scales, "ref_scales": ref_scales}
        found = _fwd(hidden, weight, bias, *ref, rows, targets, *settings, impl, **each)
        logp, ref_logp, kl = found[:3]
        # the reference's hidden states are held only where they are multiplied again
        if schedule not in (schedules.PARTIAL, schedules.RECOMPUTE):
            ref = (None, None, None)
        ctx.save_for_backward(scales, ref_scales, hidden, weight, bias, *ref, rows, targets, *found)
        ctx.mark_non_differentiable(ref_logp)
        ctx.settings, ctx.impl = settings, impl
        return logp, ref_logp, kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor, _: Tensor, grad_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        scales, ref_scales, *tensors = ctx.saved_tensors
        each = {"scales": scales, "ref_scales": ref_scales}
        grads = _bwd(grad_logp, grad_kl, *tensors, *ctx.settings, *need, ctx.impl, **each)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * 15


# The operator boundary: one opaque node per direction for torch.compile, FakeTensor, the
# profiler and the FLOP counter. It knows nothing of autograd.

torch.library.define(
    "sepo::selected_logprob_kl_fwd",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight,"
    " Tensor? ref_bias, Tensor rows, Tensor targets, float scale, float? softcap, float? ref_scale,"
    " float? ref_softcap, float beta, str schedule, SymInt budget, str impl, *,"
    " Tensor? scales=None, Tensor? ref_scales=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sepo::selected_logprob_kl_bwd",
    "(Tensor grad_logp, Tensor grad_kl, Tensor hidden, Tensor weight, Tensor? bias,"
    " Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor rows, Tensor targets,"
    " Tensor logp, Tensor ref_logp, Tensor kl, Tensor state, Tensor first, Tensor second,"
    " float scale, float? softcap, float? ref_scale, float? ref_softcap, float beta, str schedule,"
    " SymInt budget, bool need_hidden, bool need_weight, bool need_bias, str impl, *,"
    " Tensor? scales=None, Tensor? ref_scales=None)"
    " -> (Tensor, Tensor, Tensor)",
)
_BY_NAME: dict[str, Any] = {impl.name: impl for impl in IMPLS}  # all have a bwd


def _run_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, rows: Tensor, targets: Tensor, *args: Any,
    **each: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_index_values(rows, targets, hidden.shape[0], weight.shape[0])
    check_scale_values(each.get("scales"))
    check_scale_values(each.get("ref_scales"), prefix="ref_")
    heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    # autocast would also reach the products inside, and round the logits
    with torch.autocast(hidden.device.type, enabled=False), out_of_memory(args[-2]):
        return _BY_NAME[args[-1]].fwd(*heads, as_int32(rows), targets, *args[:-1], **each)


def _run_bwd(
    grad_logp: Tensor, grad_kl: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, rows: Tensor,
    *args: Any, **each: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    upstream = (grad_logp, grad_kl)
    heads = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    with torch.autocast(hidden.device.type, enabled=False), out_of_memory(args[-5]):
        return _BY_NAME[args[-1]].bwd(*upstream, *heads, as_int32(rows), *args[:-1], **each)


def _fake_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor,
    ref_bias: Tensor | None, rows: Tensor, targets: Tensor, scale: float, softcap: float | None,
    ref_scale: float | None, ref_softcap: float | None, beta: float, schedule: str, budget: int,
    impl: str, **each: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernels, M = _BY_NAME[impl].kernels, rows.shape[0]
    num_saved = schedules.saved_rows(M, kernels.layout_of(hidden, weight, beta), budget, schedule)
    return outputs(kernels, hidden, weight, rows, beta, schedule, num_saved)


def _fake_bwd(grad_logp: Tensor, grad_kl: Tensor, *args: Any, **_: Any) -> tuple[Tensor, ...]:
    return fake_gradients(*args)


torch.library.impl("sepo::selected_logprob_kl_fwd", ("cpu", "cuda"), _run_fwd)
torch.library.impl("sepo::selected_logprob_kl_bwd", ("cpu", "cuda"), _run_bwd)
torch.library.register_fake("sepo::selected_logprob_kl_fwd", _fake_fwd)
torch.library.register_fake("sepo::selected_logprob_kl_bwd", _fake_bwd)
_fwd = torch.ops.sepo.selected_logprob_kl_fwd.default
_bwd = torch.ops.sepo.selected_logprob_kl_bwd.default
