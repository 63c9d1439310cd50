"""K targets a row: ours, and plain PyTorch from the logits of the selected rows."""

from functools import partial

from bench.contender import Contender, gradients
from bench.contenders.ours import version
from bench.contenders.plain import GEMM
from sepo import ops
from sepo_kernels import target_logits
from sepo_kernels.registry import pick


def _logprob(inputs, impl: str) -> dict:
    hidden, weight = inputs.leaves()
    args = hidden, weight, inputs.rows, inputs.targets
    logp = ops.selected_logprob(*args, over=inputs.case.over, impl=impl)
    return {"logp": logp.detach(), **gradients(logp, inputs.upstream, hidden, weight)}


def _note(inputs, impl: str) -> str:
    args = *inputs.leaves(), inputs.rows, inputs.targets
    told = ops.explain_selected_logprob(*args, over=inputs.case.over, impl=impl)
    return f"{told.impl}, {told.schedule}, {told.gemms} products"


def _why_not(inputs, impl: str) -> str:
    """Why an implementation is not measured by its name."""
    tensors = inputs.hidden, inputs.weight
    try:
        pick(target_logits.IMPLS, impl, *tensors)
    except ValueError as error:
        return str(error)
    taken = pick(target_logits.IMPLS, "auto", *tensors).name
    return 'it is what "auto" takes here' if taken == impl else ""


def _ours(name: str, impl: str) -> Contender:
    told = dict(version=version, ours=True, note=partial(_note, impl=impl))
    if impl != "auto":
        told["why_not"] = partial(_why_not, impl=impl)
    return Contender(name, partial(_logprob, impl=impl), **told)


K_TARGETS = (
    GEMM,
    _ours("sepo", "auto"),
    *(_ours(f"sepo:{i.name}", i.name) for i in target_logits.IMPLS),
    Contender("dense_gathered", lambda inputs: inputs.plain(gather_first=True)),
)
