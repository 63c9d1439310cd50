"""Plain PyTorch: the logits of every row, or of the gathered rows, and a float32 log-softmax."""

from functools import partial

from bench import plain
from bench.provider import Provider, gradients


def _logprob(inputs, gather_first: bool) -> dict:
    hidden, weight = inputs.leaves()
    logp = plain.selected_logprob(
        hidden, weight, inputs.rows, inputs.targets, gather_first=gather_first
    )
    return {"logp": logp.detach(), **gradients(logp, inputs.upstream, hidden, weight)}


HEAD = (
    Provider("dense", partial(_logprob, gather_first=False)),
    Provider("dense_gathered", partial(_logprob, gather_first=True)),
)
KL = (
    Provider("softmax_both", lambda inputs: inputs.plain(gather_first=False)),
    Provider("softmax_both_gathered", lambda inputs: inputs.plain(gather_first=True)),
)
