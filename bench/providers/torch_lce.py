"""torch.nn.functional.linear_cross_entropy on gathered rows: its default, and its chunked paths."""

import torch
import torch.nn.functional as F

from bench.provider import Provider, gradients


def _why_not(inputs) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"


def _default(inputs, **options) -> dict:
    hidden, weight = inputs.leaves()
    nll = F.linear_cross_entropy(
        hidden[inputs.rows], weight, inputs.targets, reduction="none", **options
    )
    upstream = -inputs.upstream.to(nll.dtype)
    return {"logp": -nll.detach(), **gradients(nll, upstream, hidden, weight)}


def _tokens(inputs) -> dict:
    """A value a token, in chunks: 4 products."""
    return _default(inputs, options=torch.nn.LinearCrossEntropyOptions())


def _chunked(inputs) -> dict:
    """The mean: for a scalar its chunks make the gradients in the forward, 3 products instead of 4."""
    hidden, weight = inputs.leaves()
    loss = F.linear_cross_entropy(
        hidden[inputs.rows], weight, inputs.targets, options=torch.nn.LinearCrossEntropyOptions()
    )
    return {"loss": loss.detach(), **gradients(loss, None, hidden, weight)}


HEAD = (
    Provider("torch_lce", _default, _why_not, note=lambda inputs: "options=None: holds the logits"),
    Provider("torch_lce_tokens", _tokens, _why_not, note=lambda inputs: "options: in chunks"),
    Provider(
        "torch_lce_chunked", _chunked, _why_not, objective="mean",
        note=lambda inputs: "scalar mean of the rows",
    ),
)  # fmt: skip
