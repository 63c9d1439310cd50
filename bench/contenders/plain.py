"""PyTorch alone: the bound, the straightforward way, its own fused head, selection in a loop."""

import torch
import torch.nn.functional as F

from bench.contender import Contender, gradients


def _gemms(inputs) -> dict:
    """The bound: bare products of the same shapes, in the dtype that is fastest here.

    logits, then dX, then dW: as many as the case needs; those of a reference before.
    """
    x, weight, *reference = inputs.operands
    count = inputs.case.products
    if reference:
        torch.mm(reference[0], reference[1].T)
        count -= 1
    logits = torch.mm(x, weight.T)
    if count > 1:
        torch.mm(logits, weight)
    if count > 2:
        torch.mm(logits.T, x)
    return {}


def _note(inputs) -> str:
    dtype = inputs.operands[0].dtype
    how = "" if dtype == inputs.case.dtype else f" in {str(dtype).removeprefix('torch.')}"
    return f"{inputs.case.products} bare products{how}"


def _flops(inputs, seconds: float) -> str:
    return f"{inputs.flop / seconds / 1e9:.0f} GFLOP/s"


def _no_lce(inputs) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"


def _lce(inputs, **options) -> dict:
    hidden, weight = inputs.leaves()
    nll = F.linear_cross_entropy(
        hidden[inputs.rows], weight, inputs.targets, reduction="none", **options
    )
    upstream = -inputs.upstream.to(nll.dtype)
    return {"logp": -nll.detach(), **gradients(nll, upstream, hidden, weight)}


def _lce_tokens(inputs) -> dict:
    """A value a token, in chunks: 4 products."""
    return _lce(inputs, options=torch.nn.LinearCrossEntropyOptions())


def _lce_chunked(inputs) -> dict:
    """The mean: for a scalar its chunks make the gradients in the forward, 3 products instead of 4."""
    hidden, weight = inputs.leaves()
    loss = F.linear_cross_entropy(
        hidden[inputs.rows], weight, inputs.targets, options=torch.nn.LinearCrossEntropyOptions()
    )
    return {"loss": loss.detach(), **gradients(loss, None, hidden, weight)}


def _topk_loop(inputs) -> dict:
    """Selection as trainers write it: one torch.topk a segment."""
    take = lambda score, K, highest: score.topk(K, largest=highest).indices
    index, cu_rows = inputs.each_segment(take)
    return {"index": index, "cu_rows": cu_rows}


GEMM = Contender("gemm", _gemms, gated=False, note=_note, rate=_flops)
HEAD = (
    Contender("dense", lambda inputs: inputs.plain(gather_first=False)),
    Contender("dense_gathered", lambda inputs: inputs.plain(gather_first=True)),
    Contender("torch_lce", _lce, _no_lce, note=lambda inputs: "options=None: holds the logits"),
    Contender("torch_lce_tokens", _lce_tokens, _no_lce, note=lambda inputs: "options: in chunks"),
    Contender(
        "torch_lce_chunked", _lce_chunked, _no_lce, objective="mean",
        note=lambda inputs: "scalar mean of the rows",
    ),
)  # fmt: skip
KL = (
    Contender("softmax_both", lambda inputs: inputs.plain(gather_first=False)),
    Contender("softmax_both_gathered", lambda inputs: inputs.plain(gather_first=True)),
)
STATS = HEAD[:2]
HIGH_ENTROPY = HEAD[1:2]
TOPK = (
    Contender(
        "topk_loop", _topk_loop, objective="any tie", note=lambda inputs: "any of equal scores"
    ),
)
