"""Cut cross-entropy (Apple) as it is used: all rows in, labels of -100 dropped by itself."""

from bench.provider import Provider, gradients, installed, missing


def _why_not(inputs) -> str | None:
    return missing("cut-cross-entropy")


def _run(inputs) -> dict:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = inputs.leaves()
    impl = {} if inputs.device == "cuda" else {"impl": "torch_compile"}
    nll = linear_cross_entropy(hidden, weight, inputs.labels, reduction="none", **impl)  # (N,)
    nll = nll[inputs.rows]
    return {"logp": -nll.detach(), **gradients(nll, -inputs.upstream, hidden, weight)}


def _note(inputs) -> str:
    return "default impl" if inputs.device == "cuda" else 'impl="torch_compile"'


HEAD = (Provider("cce", _run, _why_not, installed("cut-cross-entropy"), note=_note),)
