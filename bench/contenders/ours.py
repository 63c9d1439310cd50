"""sepo.ops: what "auto" takes, and every named implementation that can run and is not that one."""

import importlib
from collections.abc import Callable
from functools import partial

import torch

import sepo
from bench.contender import Contender, gradients
from sepo import ops

version = lambda: f"sepo {sepo.__version__}"


def _logprob(inputs, impl: str, M: int | None = None) -> dict:
    hidden, weight = inputs.leaves()
    rows, targets = inputs.rows[:M], inputs.targets[:M]
    logp = ops.selected_logprob(hidden, weight, rows, targets, impl=impl)
    return {"logp": logp.detach(), **gradients(logp, inputs.upstream[:M], hidden, weight)}


def _schedule(inputs, impl: str) -> str:
    args = *inputs.leaves(), inputs.rows, inputs.targets
    told = ops.explain_selected_logprob(*args, impl=impl)
    return f"{told.impl}, {told.schedule}, {told.gemms} products"


def _logprob_kl(inputs, impl: str, M: int | None = None) -> dict:
    hidden, weight = inputs.leaves()
    logp, ref_logp, kl = ops.selected_logprob_kl(
        hidden, weight, inputs.ref_hidden, inputs.ref_weight, inputs.rows[:M], inputs.targets[:M],
        direction=inputs.case.direction, impl=impl,
    )  # fmt: skip
    return inputs.result(logp, ref_logp, kl, hidden, weight)


def _stats(inputs, impl: str, M: int | None = None) -> dict:
    hidden, weight = inputs.leaves()
    found = ops.selected_stats(
        hidden, weight, inputs.rows[:M], inputs.targets[:M], impl=impl,
        entropy_grad=inputs.case.entropy_grad,
    )  # fmt: skip
    values = {name: x.detach() for name, x in found._asdict().items() if name != "top1"}
    return values | gradients(inputs.loss(found.logp, found.entropy), None, hidden, weight)


def _stats_schedule(inputs, impl: str) -> str:
    args = *inputs.leaves(), inputs.rows, inputs.targets
    told = ops.explain_selected_stats(*args, entropy_grad=inputs.case.entropy_grad, impl=impl)
    return f"{told.impl}, {told.schedule}, {told.gemms} products"


def _topk(inputs, impl: str, M: int | None = None) -> dict:
    cu = inputs.cu_tokens if M is None else inputs.cu_tokens[: M + 1]
    score = inputs.score if M is None else inputs.score[: int(cu[-1])]
    index, cu_rows = ops.segment_topk(score, cu, inputs.case.fraction, "alternate", impl=impl)
    return {"index": index, "cu_rows": cu_rows}


def _reason(run: Callable, inputs, impl: str) -> str | None:
    """Why an implementation cannot run these tensors, in its own words, from a call of one row."""
    try:
        with torch.no_grad():
            run(inputs, impl=impl, M=1)
    except ValueError as error:
        return str(error)


def _taken(run: Callable, inputs, names: tuple[str, ...]) -> str:
    """What "auto" means here: the first in priority order that can run."""
    return next((n for n in names if _reason(run, inputs, n) is None), "auto")


def _why_not_named(inputs, run: Callable, names: tuple[str, ...], name: str) -> str | None:
    if reason := _reason(run, inputs, name):
        return reason
    if _taken(run, inputs, names) == name:
        return 'it is what "auto" takes here'


def _providers(op: str, run: Callable, note: Callable | None = None) -> tuple[Contender, ...]:
    if not hasattr(ops, op):
        why_not = lambda inputs: f"sepo.ops.{op} is not there yet"
        return (Contender("sepo", run, why_not, version, ours=True),)
    names = tuple(impl.name for impl in importlib.import_module(f"sepo_kernels.{op}").IMPLS)
    if note is None:
        note = lambda inputs, impl: impl if impl != "auto" else _taken(run, inputs, names)
    shared = dict(version=version, ours=True)
    auto = Contender("sepo", partial(run, impl="auto"), note=partial(note, impl="auto"), **shared)
    return auto, *(
        Contender(
            f"sepo:{name}", partial(run, impl=name), note=partial(note, impl=name),
            why_not=partial(_why_not_named, run=run, names=names, name=name), **shared,
        )
        for name in names
    )  # fmt: skip


HEAD = _providers("selected_logprob", _logprob, _schedule)
KL = _providers("selected_logprob_kl", _logprob_kl)
TOPK = _providers("segment_topk", _topk)
STATS = (
    *_providers("selected_stats", _stats, _stats_schedule),
    Contender(
        "sepo:selected_logprob", partial(_logprob, impl="auto"), version=version, objective="logp",
        ours=True, note=lambda inputs: "no statistics",
    ),
)  # fmt: skip
