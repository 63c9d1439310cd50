"""sepo.ops: what "auto" takes, and every named implementation that can run and is not that one."""

from collections.abc import Callable, Sequence
from functools import partial

import sepo
from bench.contender import Contender, gradients
from sepo import ops
from sepo_kernels import segment_topk, selected_logprob, selected_logprob_kl, selected_stats
from sepo_kernels.registry import Impl, pick

version = lambda: f"sepo {sepo.__version__}"


def _logprob(inputs, impl: str) -> dict:
    hidden, weight = inputs.leaves()
    logp = ops.selected_logprob(hidden, weight, inputs.rows, inputs.targets, impl=impl)
    return {"logp": logp.detach(), **gradients(logp, inputs.upstream, hidden, weight)}


def _schedule(inputs, impl: str) -> str:
    args = *inputs.leaves(), inputs.rows, inputs.targets
    told = ops.explain_selected_logprob(*args, impl=impl)
    return f"{told.impl}, {told.schedule}, {told.gemms} products"


def _logprob_kl(inputs, impl: str, direction: str | None = None) -> dict:
    hidden, weight = inputs.leaves()
    logp, ref_logp, kl = ops.selected_logprob_kl(
        hidden, weight, inputs.ref_hidden, inputs.ref_weight, inputs.rows, inputs.targets,
        direction=direction or inputs.case.direction, impl=impl,
    )  # fmt: skip
    return inputs.result(logp, ref_logp, kl, hidden, weight)


def _stats(inputs, impl: str) -> dict:
    hidden, weight = inputs.leaves()
    found = ops.selected_stats(
        hidden, weight, inputs.rows, inputs.targets, impl=impl,
        entropy_grad=inputs.case.entropy_grad,
    )  # fmt: skip
    values = {name: x.detach() for name, x in found._asdict().items() if name != "top1"}
    return values | gradients(inputs.loss(found.logp, found.entropy), None, hidden, weight)


def _stats_schedule(inputs, impl: str) -> str:
    args = *inputs.leaves(), inputs.rows, inputs.targets
    told = ops.explain_selected_stats(*args, entropy_grad=inputs.case.entropy_grad, impl=impl)
    return f"{told.impl}, {told.schedule}, {told.gemms} products"


def _high_entropy(inputs) -> dict:
    """As docs/migrate.md has it: a gradient of the rows that are kept alone."""
    hidden, weight = inputs.leaves()
    of = hidden, weight, inputs.rows, inputs.targets
    kept = ops.high_entropy_rows(*of, fraction=inputs.case.share)
    i = kept.indices.long()
    logp = ops.selected_logprob(hidden, weight, inputs.rows[i], inputs.targets[i])
    values = {"logp": kept.stats.logp, "entropy": kept.stats.entropy}
    return values | gradients(logp, inputs.upstream[i], hidden, weight)


def _every_row(inputs) -> dict:
    hidden, weight = inputs.leaves()
    found = ops.selected_stats(hidden, weight, inputs.rows, inputs.targets)
    return inputs.result(found.logp, found.entropy, hidden, weight)


def _topk(inputs, impl: str) -> dict:
    args = inputs.score, inputs.cu_tokens, inputs.case.fraction, "alternate"
    index, cu_rows = ops.segment_topk(*args, impl=impl)
    return {"index": index, "cu_rows": cu_rows}


def _why_not(inputs, impls: Sequence[Impl], name: str, tensors: Callable) -> str:
    """Why an implementation is not measured by its name."""
    try:
        pick(impls, name, *tensors(inputs))
    except ValueError as error:
        return str(error)
    taken = pick(impls, "auto", *tensors(inputs)).name
    return 'it is what "auto" takes here' if taken == name else ""


def _providers(
    run: Callable,
    impls: Sequence[Impl],
    tensors: Callable,  # inputs -> what an implementation is chosen by
    note: Callable | None = None,
) -> tuple[Contender, ...]:
    note = note or (lambda inputs, impl: pick(impls, impl, *tensors(inputs)).name)
    make = lambda label, impl, *why_not: Contender(
        label, partial(run, impl=impl), *why_not, version=version, ours=True,
        note=partial(note, impl=impl),
    )  # fmt: skip
    why_not = lambda name: partial(_why_not, impls=impls, name=name, tensors=tensors)
    return make("sepo", "auto"), *(make(f"sepo:{x.name}", x.name, why_not(x.name)) for x in impls)


_head = lambda inputs: (inputs.hidden, inputs.weight)
HEAD = _providers(_logprob, selected_logprob.IMPLS, _head, _schedule)
KL = (
    *_providers(_logprob_kl, selected_logprob_kl.IMPLS, _head),
    Contender(
        "sepo:kl", partial(_logprob_kl, impl="auto", direction="ref||policy"),
        lambda inputs: "the case is a KL" if isinstance(inputs.case.direction, str) else "",
        version, ours=True, gated=False, note=lambda inputs: "KL(ref || policy) instead",
    ),
)  # fmt: skip
TOPK = _providers(_topk, segment_topk.IMPLS, lambda inputs: (inputs.score, inputs.cu_tokens))
STATS = (
    *_providers(_stats, selected_stats.IMPLS, _head, _stats_schedule),
    Contender(
        "sepo:selected_logprob", partial(_logprob, impl="auto"), version=version, objective="logp",
        ours=True, note=lambda inputs: "no statistics",
    ),
)  # fmt: skip
HIGH_ENTROPY = (
    Contender("sepo", _high_entropy, version=version, ours=True, note=lambda inputs: "rows kept"),
    Contender(
        "sepo:every_row", _every_row, version=version, ours=True,
        note=lambda inputs: "and a masked loss",
    ),
)  # fmt: skip
