"""Other people's heads as they are used; their versions are told, and what each needs.

Liger's preference losses take whole sequences and answer with a scalar: the rows that are not
selected carry -100, and are computed all the same.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from bench.contender import Contender, gradients, installed, missing

ENDS = {"ref||policy": 0.0, "policy||ref": 1.0}  # of beta, the weight of TRL's teacher

_lacks = lambda package: lambda inputs: missing(package)


def _unable(what: str, module: str) -> str | None:
    """Why a module of a package does not load: it is too old, or lacks the compiler of its kernels."""
    try:
        import_module(module)
    except ImportError as error:
        return f"{what}: {error}"


def _cce(inputs) -> dict:
    """Apple's cut cross-entropy: all rows in, labels of -100 dropped by itself."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = inputs.leaves()
    impl = {} if inputs.device == "cuda" else {"impl": "torch_compile"}
    nll = linear_cross_entropy(hidden, weight, inputs.labels, reduction="none", **impl)  # (N,)
    nll = nll[inputs.rows]
    return {"logp": -nll.detach(), **gradients(nll, -inputs.upstream, hidden, weight)}


def _trl_head(inputs, hidden, weight, outputs: tuple[str, ...] = ()) -> list[torch.Tensor]:
    """TRL's fused head as its trainers call it: logp and `outputs` of the rows that count, (M,)."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction, _use_triton

    mask = inputs.labels != -100
    # as in its forward: without Triton every position is scored
    compact = _use_triton(hidden.device)
    found = _ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden, weight, None,
        inputs.labels[mask] if compact else inputs.labels.clamp(min=0),
        1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs,
    )  # fmt: skip
    return [x if compact else x[mask] for x in found if x is not None]


def _trl(inputs) -> dict:
    """As its DPO trainer asks."""
    hidden, weight = inputs.leaves()
    (logp,) = _trl_head(inputs, hidden, weight)
    return {"logp": logp.detach(), **gradients(logp, inputs.upstream, hidden, weight)}


def _trl_stats(inputs) -> dict:
    """All that it gives."""
    hidden, weight = inputs.leaves()
    outputs = "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"
    logp, entropy, *others, _ = _trl_head(inputs, hidden, weight, outputs)
    names = "logp", "entropy", "log_sum_sq", "mean_logit"
    values = dict(zip(names, (logp.detach(), entropy.detach(), *others), strict=True))
    return values | gradients(inputs.loss(logp, entropy), None, hidden, weight)


def _trl_every_row(inputs) -> dict:
    """As its GRPO trainer does with `top_entropy_quantile`: all rows, and a masked loss."""
    hidden, weight = inputs.leaves()
    logp, entropy = _trl_head(inputs, hidden, weight, ("entropy",))
    return inputs.result(logp, entropy, hidden, weight)


def _no_divergence(inputs) -> str | None:
    return missing("trl") or _unable("trl", "trl.kernels.chunked_divergence")


def _divergence(inputs) -> dict:
    """Of its distillation trainer, of rows that the caller gathered: the divergence alone."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight = inputs.leaves()
    direction = inputs.case.direction
    beta = ENDS[direction] if isinstance(direction, str) else direction[1]
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden[inputs.rows], weight, None, inputs.ref_hidden[inputs.rows], inputs.ref_weight, None,
        beta,
    )  # fmt: skip
    return {"kl": kl.detach(), **gradients(kl, inputs.upstream_kl, hidden, weight)}


def _preference(inputs, name: str, **options) -> dict:
    from liger_kernel import chunked_loss

    hidden, weight = inputs.leaves()
    case = inputs.case
    pairs_first = lambda x: x.view(case.segments, case.N // case.segments, *x.shape[1:])
    loss, _ = getattr(chunked_loss, name)(**options)(
        weight, pairs_first(hidden), pairs_first(inputs.labels)
    )
    return {"loss": loss.detach(), **gradients(loss, None, hidden, weight)}


def _no_triton(inputs) -> str | None:
    if inputs.device != "cuda":
        return "its Triton kernels need a GPU"
    return missing("liger-kernel")


def _liger_rows(inputs, name: str, *options) -> dict:
    from liger_kernel import ops

    hidden, weight = inputs.leaves()
    mask = inputs.labels != -100
    nll = getattr(ops, name).apply(hidden[mask], weight, inputs.labels[mask], *options)
    nll = nll[0] if isinstance(nll, tuple) else nll
    return {"logp": -nll.detach(), **gradients(nll, -inputs.upstream, hidden, weight)}


def _gathered(inputs) -> dict:
    none = None, None, -100, 0.0, 0.0, "none"
    return _liger_rows(inputs, "LigerFusedLinearCrossEntropyFunction", *none)


def _no_sm90(inputs, exactly: bool = False) -> str | None:
    if inputs.device != "cuda":
        return "its kernels need a GPU of compute capability 9.0"
    found = torch.cuda.get_device_capability()
    if found != (9, 0) if exactly else found < (9, 0):
        return f"needs compute capability 9.0, got {found}"


def _no_hopper(inputs) -> str | None:
    absent = _no_sm90(inputs, exactly=True) or missing("liger-kernel")
    module = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    return absent or _unable("liger-kernel[cutedsl]", module)


def _hopper(inputs) -> dict:
    return _liger_rows(inputs, "LigerFusedLinearScaledCrossEntropyFunction")


def _no_quack(inputs) -> str | None:
    return _no_sm90(inputs) or _unable("quack-kernels", "quack.linear_cross_entropy")


def _quack(inputs) -> dict:
    """On gathered rows, the mean: it has no value a token."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden, weight = inputs.leaves()
    loss = chunked_linear_cross_entropy(hidden[inputs.rows], weight, inputs.targets)
    return {"loss": loss.detach(), **gradients(loss, None, hidden, weight)}


def _of_trl(run: Callable, **more) -> Contender:
    note = lambda inputs: "" if inputs.device == "cuda" else "torch ops, every position"
    return Contender("trl", run, _lacks("trl"), installed("trl"), note=note, **more)


_simpo = partial(_preference, name="LigerFusedLinearSimPOLoss", compute_nll_loss=False)
_dpo = partial(_preference, name="LigerFusedLinearDPOLoss", use_ref_model=False)
_liger = installed("liger-kernel")
HEAD = (
    Contender(
        "cce", _cce, _lacks("cut-cross-entropy"), installed("cut-cross-entropy"),
        note=lambda i: "default impl" if i.device == "cuda" else 'impl="torch_compile"',
    ),
    _of_trl(_trl),
    Contender(
        "liger_simpo", _simpo, _lacks("liger-kernel"), _liger, objective="simpo",
        note=lambda inputs: "all rows, loss without NLL",
    ),
    Contender(
        "liger_dpo", _dpo, _lacks("liger-kernel"), _liger, objective="dpo",
        note=lambda inputs: "all rows, no reference model",
    ),
    Contender("liger", _gathered, _no_triton, _liger, note=lambda inputs: "hidden[mask]"),
    Contender("liger_hopper", _hopper, _no_hopper, _liger, note=lambda inputs: "hidden[mask]"),
    Contender(
        "quack", _quack, _no_quack, installed("quack-kernels"), objective="mean",
        note=lambda inputs: "scalar mean of the rows",
    ),
)  # fmt: skip
KL = (
    Contender(
        "trl_divergence", _divergence, _no_divergence, installed("trl"), objective="kl",
        note=lambda inputs: "hidden[rows], KL without log-probabilities",
    ),
)  # fmt: skip
STATS = (_of_trl(_trl_stats, objective="trl"),)
HIGH_ENTROPY = (_of_trl(_trl_every_row),)
