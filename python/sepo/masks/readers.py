"""Read what masks need of the reference: states and activations of its layers, by forward hooks.

The trunk runs once, packed, without gradients. Rows are gathered inside the hooks, so that no
layer's (N, D) outlives the layer.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.model.forward import base_of, hidden_states


def num_layers(model: nn.Module) -> int:
    """Layers of the decoder. Raises InputError for a model whose layers can't be found."""
    return len(_layers(base_of(model)))


@torch.no_grad()
def layer_states(
    model: nn.Module,  # prepared; or a PeftModel, whose adapters the caller switches off
    batch: PackedBatch,
) -> tuple[Tensor, Tensor]:  # hidden (N, D); states (L, M, D), both detached
    """The trunk's output after the final norm, and each layer's at the rows that predict targets.

    The last layer's is read after the final norm; embeddings are no layer. Raises InputError for a
    model whose layers can't be found.
    """
    gather = lambda output: output.index_select(0, batch.rows)
    base = base_of(model)
    hidden, states = _read(base, batch, _layers(base)[:-1], gather)
    return hidden, torch.stack([*states, gather(hidden)])


@torch.no_grad()
def layer_activations(
    model: nn.Module,  # prepared; or a PeftModel, whose adapters the caller switches off
    batch: PackedBatch,
) -> tuple[Tensor, Tensor]:  # hidden (N, D); activations (G, M) float32, G = 3 L, both detached
    """The trunk's output after the final norm, and MaPO's activations at the rows of the batch.

    An activation is the mean over features of what attention, feed-forward or the layer itself puts
    out. Raises InputError for a model in which they can't be found.
    """

    def gather(output: Tensor) -> Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        return output.index_select(0, batch.rows).mean(-1, dtype=dtype)

    base = base_of(model)
    modules = [part for layer in _layers(base) for part in _parts(base, layer)]
    # a hook makes another graph of a compiled part, and is another one in every step
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in modules)
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        hidden, activations = _read(base, batch, modules, gather)
    return hidden, torch.stack(activations)


def _read(
    model: PreTrainedModel,
    batch: PackedBatch,
    modules: list[nn.Module],
    gather: Callable[[Tensor], Tensor],  # (N, D) -> what is kept of it
) -> tuple[Tensor, list[Tensor]]:  # (N, D), one a module
    outputs: list[list[Tensor]] = [[] for _ in modules]
    shape = (len(batch.tokens),)

    def keep(kept: list[Tensor], module: nn.Module, inputs, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.shape[:-1] not in (shape, (1, *shape)):
            raise InputError(
                f"{_name(model)}: expected {type(module).__name__} to put out a state for each of "
                f"{shape[0]} tokens, got {tuple(output.shape)}; its masks are not supported"
            )
        kept.append(gather(output.reshape(*shape, -1)))

    with ExitStack() as stack:
        for kept, module in zip(outputs, modules, strict=True):
            handle = module.register_forward_hook(partial(keep, kept))
            stack.callback(handle.remove)
        hidden = hidden_states(model, batch)
    for kept, module in zip(outputs, modules, strict=True):
        if len(kept) != 1:
            raise InputError(
                f"{_name(model)}: expected each {type(module).__name__} to run once a pass, "
                f"got {len(kept)} times; its masks are not supported"
            )
    return hidden, [kept[0] for kept in outputs]


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    layers: list[nn.Module] = [
        m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    config = model.config.get_text_config(decoder=True)
    expected = getattr(config, "num_hidden_layers", len(layers))
    if not layers or len(layers) != expected:
        raise InputError(
            f"{_name(model)}: expected {expected} decoder layers of transformers, found "
            f"{len(layers)}; its masks are not supported"
        )
    return layers


def _parts(model: PreTrainedModel, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Feed-forward, attention and residual of a layer, told apart by what they are made of."""
    children = [child for child in layer.children() if _has_matrix(child)]
    # the mark by which transformers' attention interface knows its callers
    attention = [c for c in children if any(hasattr(m, "is_causal") for m in c.modules())]
    others = [child for child in children if child not in attention]
    blocks = [child for child in others if not _is_linear(child)]
    # OPT writes its feed-forward out in the layer: the last projection's output is the block's
    feed_forward = blocks or others[-1:]
    if (len(attention), len(feed_forward)) != (1, 1):
        raise InputError(
            f"{_name(model)}: expected one attention and one feed-forward block in "
            f"{type(layer).__name__}, found {len(attention)} and {len(feed_forward)}; its "
            "activation masks are not supported"
        )
    return feed_forward[0], attention[0], layer


def _has_matrix(module: nn.Module) -> bool:
    """Whether it is more than a norm. ZeRO-3 leaves a flat rest of a parameter, and its shape."""
    return any(len(getattr(p, "ds_shape", p.shape)) > 1 for p in module.parameters())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear)  # peft keeps it inside


def _name(model: PreTrainedModel) -> str:
    return type(model.get_decoder()).__name__
