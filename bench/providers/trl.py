"""TRL's fused head: what `add_fused_lm_head` of its DPO trainer calls, with its constants."""

from bench.provider import Provider, gradients, installed, missing


def _why_not(inputs) -> str | None:
    return missing("trl")


def _run(inputs) -> dict:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction, _use_triton

    hidden, weight = inputs.leaves()
    labels = inputs.labels
    mask = labels != -100
    # as in its forward: without Triton every position is scored
    compact = _use_triton(hidden.device)
    logp = _ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden, weight, None,
        labels[mask] if compact else labels.clamp(min=0),
        1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",),
    )[0]  # fmt: skip
    logp = logp if compact else logp[mask]
    return {"logp": logp.detach(), **gradients(logp, inputs.upstream, hidden, weight)}


def _note(inputs) -> str:
    return "" if inputs.device == "cuda" else "torch ops, every position"


HEAD = (Provider("trl", _run, _why_not, installed("trl"), note=_note),)
