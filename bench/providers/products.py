"""The bound: the bare matrix products of the same shapes, in the dtype that is fastest here."""

import torch

from bench.provider import Provider


def _head(inputs) -> dict:
    """logits, then dX, then dW: as many as the case needs."""
    (x, weight), count = inputs.operands, inputs.case.products
    logits = torch.mm(x, weight.T)
    if count > 1:
        torch.mm(logits, weight)
    if count > 2:
        torch.mm(logits.T, x)
    return {}


def _kl(inputs) -> dict:
    x, weight, ref_x, ref_weight = inputs.operands
    torch.mm(ref_x, ref_weight.T)
    logits = torch.mm(x, weight.T)
    torch.mm(logits, weight)
    torch.mm(logits.T, x)
    return {}


def _note(inputs) -> str:
    dtype = inputs.operands[0].dtype
    how = "" if dtype == inputs.case.dtype else f" in {str(dtype).removeprefix('torch.')}"
    return f"{inputs.case.products} bare products{how}"


def _flops(inputs, seconds: float) -> str:
    return f"{inputs.flop / seconds / 1e9:.0f} GFLOP/s"


def _bound(run) -> Provider:
    return Provider("gemm", run, gated=False, note=_note, work=_flops)


HEAD = (_bound(_head),)
KL = (_bound(_kl),)
