"""The bound: the bare matrix products of the same shapes."""

import torch

from bench.provider import Provider


def _head(inputs) -> dict:
    """logits, then dX, then dW: as many as the case needs, in the dtype of the inputs."""
    x, weight, count = inputs.gathered, inputs.weight, inputs.case.products
    logits = torch.mm(x, weight.T)
    if count > 1:
        torch.mm(logits, weight)
    if count > 2:
        torch.mm(logits.T, x)
    return {}


def _kl(inputs) -> dict:
    x, ref_x = inputs.gathered
    torch.mm(ref_x, inputs.ref_weight.T)
    logits = torch.mm(x, inputs.weight.T)
    torch.mm(logits, inputs.weight)
    torch.mm(logits.T, x)
    return {}


def _note(inputs) -> str:
    return f"{inputs.case.products} bare products"


def _flops(inputs, seconds: float) -> str:
    return f"{inputs.flop / seconds / 1e9:.0f} GFLOP/s"


def _bound(run) -> Provider:
    return Provider("gemm", run, gated=False, note=_note, work=_flops)


HEAD = (_bound(_head),)
KL = (_bound(_kl),)
