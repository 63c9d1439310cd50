"""This library's head inside a transformers model's own forward, for trainers that wrap the model.

A head that is read outside the wrapped forward passes DDP's, FSDP2's and ZeRO's hooks by: gradients
that nobody averages, or a weight that is not there.
"""

import inspect
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import sepo.ops as ops
from sepo.errors import InputError
from sepo.model.forward import base_of, head, vocabulary
from sepo.model.prepare import rounding
from sepo.patch._loss import asks_for_loss_alone, by_name, label_loss, logprob
from sepo.patch._replace import Patch, check_version

KNOWN = ">=5.17,<6"  # versions whose get_decoder, get_output_embeddings and get_text_config we call
_MARK = "returns_label_logprob"
_LIGER = (
    "expected no other fused head, got Liger's; pass "
    'liger_kernel_config={"fused_linear_cross_entropy": False}'
)


class LabelLogprob(NamedTuple):
    """Hold what a patched model returns for `selected_labels`; sequence b is segment b."""

    logp: Tensor  # (M,) float32 nats, of every label that is not -100, in order
    cu_rows: Tensor  # (B + 1,) int32, from 0 to M


def transformers(model: nn.Module) -> Patch:
    """Make the model's own loss of `labels`, and log-probabilities of `selected_labels`, need no logits.

    In training, model(..., labels=labels) returns the loss that it returned before, and gradients.
    Its output has `logits=None`: a Trainer or loop that reads the loss alone may stay as it is, and
    one that reads the logits too passes `skip_logits=False`.
    model(..., selected_labels=labels) returns `LabelLogprob`. Labels are (B, T) int64 token ids,
    -100 where a token is not selected; the shift is made inside, as transformers' own losses make
    it. Other arguments go to the model's trunk. The work is done inside the model's forward, so it
    may be wrapped afterwards (DDP, FSDP2, ZeRO, a Trainer). Under autocast the head computes in its
    dtype.

        with sepo.patch.transformers(model):
            logp, cu_rows = model(input_ids=ids, attention_mask=mask, selected_labels=labels)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss  # in training

    Every other call is the model's own: in evaluation, without labels (so too where a Trainer
    smooths labels or has a loss of its own), with a router's loss, a cache, `logits_to_keep`, or
    inputs that the trunk does not take. `skip_logits=True` asks for the loss alone in evaluation,
    and False for the logits in training.

    Args:
        model: a transformers model with a decoder and one linear head, or a PeftModel around one;
            wherever it is, in any floating dtype.

    Returns:
        Patch: its `undo()`, or the end of a `with` block, gives the model its forward back.

    Raises:
        InputError: for a transformers version that is not known, a model that is patched already or
            has Liger's fused cross entropy (then or when it is called), an encoder-decoder,
            prompt-learning adapters, a head that is not one linear layer (or has an adapter), and a
            model whose own log-probabilities of a few random tokens are others: it does something
            to its logits that is not known here. That comparison is left out where the weights are
            on no device yet, or in shards.
    """
    check_version("transformers", KNOWN)
    base = base_of(model)
    name = type(base).__name__
    if is_patched(model):
        raise InputError(f"{name} is patched already: expected a model with a forward of its own")
    if reason := _why_not(model, base):
        raise InputError(f"{name} is not supported: {reason}")
    head(base)
    _check_against_itself(base)
    patch = Patch()
    patch.replace(base, "forward", MethodType(_with_labels(base), base))
    patch.at_undo(base.register_forward_pre_hook(_refuse_liger).remove)
    return patch


def is_patched(model: Any) -> bool:
    """Whether `selected_labels` is understood already, under whatever has been put around it."""
    return hasattr(base_of(model).forward, _MARK)


def _with_labels(base: Any) -> Any:
    own = base.forward
    bound = isinstance(own, MethodType) and own.__self__ is base
    # unbound again where it can be, so that a deep copy of the model runs its own weights
    function = own.__func__ if bound else lambda _, *args, **kwargs: own(*args, **kwargs)
    names = inspect.signature(type(base).forward)

    def forward(
        self: nn.Module,
        *args: Any,
        selected_labels: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if selected_labels is not None:
            return _label_logprob(self, selected_labels, *args, **kwargs)
        if self.training if skip_logits is None else skip_logits:
            inputs = by_name(names, self, *args, **kwargs)
            if asks_for_loss_alone(self, inputs):
                return label_loss(self, inputs)
        return function(self, *args, **kwargs)

    # Trainer reads from the signature which columns a model wants
    signature = inspect.signature(own)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[this, *signature.parameters.values()]
    )
    setattr(forward, _MARK, True)
    return forward


def _label_logprob(base: Any, labels: Tensor, *args: Any, **kwargs: Any) -> LabelLogprob:
    kwargs["use_cache"] = False
    hidden = base.get_decoder()(*args, **kwargs).last_hidden_state
    rows, targets, cu_rows = ops.rows_from_labels(labels)
    return LabelLogprob(logprob(base, hidden, rows, targets), cu_rows)


def _why_not(model: Any, base: Any) -> str | None:
    if not hasattr(base, "get_decoder") or not hasattr(base, "get_output_embeddings"):
        return "expected a transformers model with a language-model head"
    if getattr(base.config, "is_encoder_decoder", False):
        return "expected a decoder, got an encoder and a decoder"
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return f"{adapter.peft_type.value} adapters put tokens or keys before every sequence"
    return _LIGER if _is_ligers(base.forward) else None


def _refuse_liger(base: Any, args: tuple[Any, ...]) -> None:
    """Refuse what a Trainer with `use_liger_kernel` has put in this patch's place since."""
    if _is_ligers(base.forward):
        raise InputError(f"{type(base).__name__} is patched no more: {_LIGER}")


def _is_ligers(forward: Any) -> bool:
    return getattr(forward, "__module__", "").startswith("liger_kernel.")


@torch.no_grad()
def _check_against_itself(base: Any) -> None:
    """Compare a few random tokens' log-probabilities with those of the model's own logits."""
    if any(p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in base.parameters()):
        return  # only collectives could run it
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary(base), (2, 6), generator=generator).to(base.device)
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        logits = base(input_ids=ids, use_cache=False).logits[:, :-1]
        found = _label_logprob(base, ids, input_ids=ids).logp
    finally:
        for module, training in modes.items():
            module.training = training
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    expected = logp.gather(-1, ids[:, 1:, None]).flatten()
    error = (found - expected).abs().max().item()
    if not error <= rounding(base, expected):
        raise InputError(
            f"{type(base).__name__} is not supported: log-probabilities from its hidden states "
            f"differ from its own by {error:.2g} nats"
        )
