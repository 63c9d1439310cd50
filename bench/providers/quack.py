"""quack's linear cross-entropy on gathered rows, whose kernels are for Hopper and later."""

import torch

from bench.provider import Provider, gradients, installed


def _why_not(inputs) -> str | None:
    if inputs.device != "cuda":
        return "its kernels need a GPU of compute capability 9.0"
    if torch.cuda.get_device_capability() < (9, 0):
        return f"needs compute capability 9.0, got {torch.cuda.get_device_capability()}"
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy  # noqa: F401
    except ImportError as error:  # it, or the compiler of its kernels
        return f"quack-kernels: {error}"


def _run(inputs) -> dict:
    """The mean: it has no value a token."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight = inputs.leaves()
    loss = chunked_linear_cross_entropy(hidden[inputs.rows], weight, inputs.targets)
    return {"loss": loss.detach(), **gradients(loss, None, hidden, weight)}


HEAD = (
    Provider(
        "quack", _run, _why_not, installed("quack-kernels"), objective="mean",
        note=lambda inputs: "scalar mean of the rows",
    ),
)  # fmt: skip
