"""A transformers decoder on packed batches: its hidden states, its head, its log-probabilities."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from sepo import attention
from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.model.base import Base, base_of
from sepo.model.folder import is_adapter
from sepo.ops import selected_logprob


def token_logprob(
    model: nn.Module,  # of transformers, or a PeftModel around one
    batch: PackedBatch,
    *,
    layout: attention.PackedLayout | None = None,  # see hidden_states
    budget: int | None = None,  # bytes for logits or probabilities, see selected_logprob
    impl: str = "auto",
    routers: list[Tensor] | None = None,  # see hidden_states
) -> Tensor:  # (M,) float32, natural log-probability of batch.targets at batch.rows
    """Log-probability of every selected token; differentiable unless under no_grad.

    Call it inside the wrapped module's forward (`prepare_model` arranges that), or the hooks of DDP
    and FSDP2 do not fire.
    """
    hidden = hidden_states(model, batch, layout=layout, routers=routers)
    hidden, (weight, bias, scale, softcap) = under_autocast(hidden, head(model))
    return selected_logprob(
        hidden,
        weight,
        batch.rows,
        batch.targets,
        bias=bias,
        scale=scale,
        softcap=softcap,
        budget=budget,
        impl=impl,
    )


def hidden_states(
    model: nn.Module,  # as above
    batch: PackedBatch,
    *,
    layout: attention.PackedLayout | None = None,  # of the batch; None: by the model's attn_impl
    routers: list[Tensor] | None = None,  # to fill with every layer's (N, experts) router logits
) -> Tensor:  # (N, D)
    """The trunk's output after the final norm, for every row of the packed buffer."""
    base = base_of(model)
    use_packed_attention(base)  # any other would let the pairs see each other
    output = base.get_decoder()(
        input_ids=batch.tokens[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,  # a 2-D mask of ones would let the pairs see each other
        use_cache=False,
        packed_layout=layout or attention.PackedLayout(batch, attn_impl(base)),
        **({} if routers is None else {"output_router_logits": True}),
    )
    if routers is not None:
        routers += [logits.flatten(0, -2) for logits in output.router_logits]
    return output.last_hidden_state.squeeze(0)  # a select's backward would fill zeros


class Head(NamedTuple):
    """logits = softcap * tanh((hidden @ weight.T * scale + bias) / softcap)"""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def head(model: nn.Module) -> Head:
    """Read what follows the model's trunk. Raises InputError for a head that isn't one matrix."""
    base = base_of(model)
    module = base.get_output_embeddings()
    if reason := _why_not_head(base, module):
        raise InputError(f"{type(base).__name__}: expected an nn.Linear head, {reason}")
    config = base.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    factor = getattr(config, "logit_scale", None)  # Cohere multiplies
    return Head(
        weight=_full(module.weight),
        bias=None if module.bias is None else _full(module.bias),
        scale=(factor or 1.0) / (divisor or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def under_autocast(hidden: Tensor, own: Head) -> tuple[Tensor, Head]:
    """Cast states and head as autocast would: it does not know the operators that read them."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, own
    hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    bias = None if own.bias is None else own.bias.to(hidden)
    return hidden, own._replace(weight=own.weight.to(hidden), bias=bias)


def vocabulary(model: nn.Module) -> int:
    """How many tokens the model can both read and predict."""
    base = base_of(model)
    # not the weights' shapes: ZeRO-3 leaves those empty
    sizes = base.get_input_embeddings().num_embeddings, base.get_output_embeddings().out_features
    return min(sizes)


def attn_impl(model: nn.Module) -> str:
    """The attention that prepare_model was asked for."""
    return getattr(base_of(model), "packed_attn_impl", "auto")


def use_packed_attention(base: Base) -> None:
    if base.config._attn_implementation != attention.ATTENTION:
        base.own_attention = base.config._attn_implementation
        base.set_attn_implementation(attention.ATTENTION)


def restore_attention(model: nn.Module) -> None:
    """Give a prepared model the attention that it had, until a batch needs ours again."""
    base = base_of(model)
    if base.config._attn_implementation == attention.ATTENTION and hasattr(base, "own_attention"):
        base.set_attn_implementation(base.own_attention)


def _why_not_head(model: PreTrainedModel, module: nn.Module | None) -> str | None:
    name = type(module).__name__
    if is_adapter(module):
        return f"got {name} of peft; an adapter on the head is not supported"
    tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if tied and is_adapter(model.get_input_embeddings()):
        return (
            "got one tied to an embedding with an adapter; an adapter on the head is not supported"
        )
    if not isinstance(module, nn.Linear):
        return f"got {name}"
    if getattr(model, "tp_size", None) not in (None, 1):
        return f"got {name} split by tensor parallelism"
    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = (Tensor, nn.Parameter, DTensor)
    if type(module.weight) not in tensors or module.weight.dtype not in plain:
        kind = f"{type(module.weight).__name__} of {module.weight.dtype}"
        return f"got {name} with a quantised weight ({kind}); leave the head out of quantisation"
    return None


def _full(parameter: Tensor) -> Tensor:
    """All of a head that FSDP2 shards on its own; a head in the root's group is whole already."""
    if isinstance(parameter, DTensor):
        # every rank used all of it for its own pairs: gradients average, like FSDP2's own
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter
