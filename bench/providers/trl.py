"""TRL's fused head, as its DPO trainer calls it, and the divergence of its distillation trainer."""

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


def _no_divergence(inputs) -> str | None:
    if reason := missing("trl"):
        return reason
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: F401
    except ImportError as error:
        return f"this trl has no chunked divergence ({error})"


def _divergence(inputs) -> dict:
    """The KL alone, of rows that the caller gathered; log-probabilities it has none."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight = inputs.leaves()
    forward = inputs.case.direction == "ref||policy"
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden[inputs.rows], weight, None, inputs.ref_hidden[inputs.rows], inputs.ref_weight, None,
        0.0 if forward else 1.0,
    )  # fmt: skip
    return {"kl": kl.detach(), **gradients(kl, inputs.upstream_kl, hidden, weight)}


def _note(inputs) -> str:
    return "" if inputs.device == "cuda" else "torch ops, every position"


HEAD = (Provider("trl", _run, _why_not, installed("trl"), note=_note),)
KL = (
    Provider(
        "trl_divergence", _divergence, _no_divergence, installed("trl"), objective="kl",
        note=lambda inputs: "hidden[rows], KL without log-probabilities",
    ),
)  # fmt: skip
