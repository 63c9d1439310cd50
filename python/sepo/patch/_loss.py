"""A transformers model's own loss of its labels, with this library's head and without the logits."""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

import sepo.ops as ops
from sepo.model.forward import head, under_autocast
from sepo.patch._labels import UNUSED

# what a model's forward takes for its loss and its output, and not for its trunk
_BESIDE_TRUNK = {
    "labels", "shift_labels", "num_items_in_batch", "ignore_index",
    "logits_to_keep", "return_dict", "use_cache",
}  # fmt: skip


def by_name(signature: inspect.Signature, base: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return a call's arguments by the names that the model's own forward gives them."""
    found = signature.bind(base, *args, **kwargs)
    named = dict(list(found.arguments.items())[1:])
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def asks_for_loss_alone(base: Any, inputs: dict[str, Any]) -> bool:
    """Whether `label_loss` gives all that a call with labels wants but its logits.

    A cache, a tuple, some of the logits, a router's loss, another loss than transformers' for
    causal models, or an input that the trunk does not take are left to the model's own forward.
    """
    if inputs.get("labels") is None or base.loss_function is not ForCausalLMLoss:
        return False
    config = base.config.get_text_config(decoder=True)
    routers = inputs.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if routers is None else routers:
        return False
    plain = inputs.get("return_dict")
    if not (base.config.return_dict if plain is None else plain):
        return False
    keep = inputs.get("logits_to_keep")
    if inputs.get("use_cache") or inputs.get("past_key_values") is not None:
        return False
    return (keep is None or (isinstance(keep, int) and keep == 0)) and not _beyond(base, inputs)


def label_loss(base: Any, inputs: dict[str, Any]) -> CausalLMOutputWithPast:
    """Return transformers' mean loss of the labels, or their sum over `num_items_in_batch`.

    The model's output has no logits and no cache. As in the model's own forward, `shift_labels`
    are labels where their states are.
    """
    trunk = {name: value for name, value in inputs.items() if name not in _BESIDE_TRUNK}
    found = base.get_decoder()(**trunk, use_cache=False)
    unused = inputs.get("ignore_index", UNUSED)
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = F.pad(inputs["labels"], (0, 1), value=unused)[..., 1:]
    labels = labels.flatten().to(found.last_hidden_state.device)
    rows = (labels != unused).nonzero()[:, 0]
    logp = logprob(base, found.last_hidden_state, rows, labels[rows])
    items = inputs.get("num_items_in_batch")
    if isinstance(items, Tensor):
        items = items.to(logp.device)
    return CausalLMOutputWithPast(
        loss=-logp.sum() / (len(rows) if items is None else items),
        hidden_states=found.hidden_states,
        attentions=found.attentions,
    )


def logprob(
    base: Any,
    hidden: Tensor,  # (B, T, D) after the final norm
    rows: Tensor,  # (M,) into the flattened states
    targets: Tensor,  # (M,) int64
) -> Tensor:  # (M,) float32 nats
    """Return the targets' log-probabilities under the model's head; it computes in autocast's dtype."""
    hidden, own = under_autocast(hidden.flatten(0, 1), head(base))
    return ops.selected_logprob(
        hidden, own.weight, rows, targets, bias=own.bias, scale=own.scale, softcap=own.softcap
    )


def _beyond(base: Any, inputs: dict[str, Any]) -> set[str]:
    """Name what the model's forward has an argument for and its trunk does not: images, say."""
    explicit = lambda module: set(inspect.signature(type(module).forward).parameters)
    given = {name for name, value in inputs.items() if value is not None}
    return (given & explicit(base)) - explicit(base.get_decoder()) - _BESIDE_TRUNK
