"""Liger: its chunked preference losses, and its heads on rows that the caller gathered.

The preference losses take whole sequences and answer with a scalar: the rows that are not selected
carry -100, and are computed all the same.
"""

from functools import partial

import torch

from bench.provider import Provider, gradients, installed, missing


def _package_missing(inputs) -> str | None:
    return missing("liger-kernel")


def _preference(inputs, name: str, **options) -> dict:
    from liger_kernel import chunked_loss

    hidden, weight = inputs.leaves()
    case = inputs.case
    pairs_first = lambda x: x.view(case.segments, case.N // case.segments, *x.shape[1:])
    loss, _ = getattr(chunked_loss, name)(**options)(
        weight, pairs_first(hidden), pairs_first(inputs.labels)
    )
    return {"loss": loss.detach(), **gradients(loss, None, hidden, weight)}


def _no_triton(inputs) -> str | None:
    if inputs.device != "cuda":
        return "its Triton kernels need a GPU"
    return missing("liger-kernel")


def _gathered(inputs) -> dict:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    hidden, weight = inputs.leaves()
    mask, none = inputs.labels != -100, (None, None, -100, 0.0, 0.0, "none")
    nll = LigerFusedLinearCrossEntropyFunction.apply(
        hidden[mask], weight, inputs.labels[mask], *none
    )[0]
    return {"logp": -nll.detach(), **gradients(nll, -inputs.upstream, hidden, weight)}


def _no_hopper(inputs) -> str | None:
    if inputs.device != "cuda":
        return "its Hopper kernel needs a GPU of compute capability 9.0"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"needs compute capability 9.0, got {torch.cuda.get_device_capability()}"
    if reason := missing("liger-kernel"):
        return reason
    try:
        from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90  # noqa: F401
    except ImportError as error:
        return f"liger-kernel[cutedsl]: {error}"


def _hopper(inputs) -> dict:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    hidden, weight = inputs.leaves()
    mask = inputs.labels != -100
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden[mask], weight, inputs.labels[mask]
    )
    return {"logp": -nll.detach(), **gradients(nll, -inputs.upstream, hidden, weight)}


_simpo = partial(_preference, name="LigerFusedLinearSimPOLoss", compute_nll_loss=False)
_dpo = partial(_preference, name="LigerFusedLinearDPOLoss", use_ref_model=False)
_version = installed("liger-kernel")
HEAD = (
    Provider(
        "liger_simpo", _simpo, _package_missing, _version, objective="simpo",
        note=lambda inputs: "all rows, loss without NLL",
    ),
    Provider(
        "liger_dpo", _dpo, _package_missing, _version, objective="dpo",
        note=lambda inputs: "all rows, no reference model",
    ),
    Provider("liger", _gathered, _no_triton, _version, note=lambda inputs: "hidden[mask]"),
    Provider("liger_hopper", _hopper, _no_hopper, _version, note=lambda inputs: "hidden[mask]"),
)  # fmt: skip
