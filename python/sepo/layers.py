"""What is done to the layers of a model before it is trained."""

from functools import partial

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

DEAR = {  # by namespace: matrix products, and every attention that a packed batch may take
    "aten": (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "sepo": ("native_packed_attention",),
    "torch_attn": ("_varlen_attn",),
    "flash_attn": ("_flash_attn_varlen_forward",),
}


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero, attention's included, adapters' not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def recompute_cheap(model: PreTrainedModel) -> None:
    """Keep what products and attention put out, and make everything between them again in backward.

    Norms, activations, rotations and casts take most of a layer's memory and little of its time.
    The gradient is the same, bit for bit.
    """
    keep = [
        operator.default
        for namespace, names in DEAR.items()
        for name in names
        if (operator := getattr(getattr(torch.ops, namespace), name, None)) is not None
    ]
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(  # its name before transformers 5.20
        {
            "use_reentrant": False,
            "context_fn": partial(create_selective_checkpoint_contexts, keep),
        }
    )


def compile_layers(model: nn.Module, plugin: TorchDynamoPlugin) -> None:
    """Compile the parts of every decoder layer in place: names in the state dict stay as they are.

    Parts, because activation checkpointing wraps a layer and the compiler does not look through
    it: compiled parts are recomputed as they ran first. All layers share the code of one, and
    sizes are dynamic from the start, or the second batch would compile everything again.
    """
    if next(model.parameters()).device.type == "cpu":
        _name_vectors()
    kwargs = plugin.to_kwargs() | {"dynamic": True, "fullgraph": False}
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                if next(part.parameters(), None) is not None:  # a dropout is not worth a graph
                    part.compile(**kwargs)


def _name_vectors() -> None:
    """Make the width of the vectors a part of what inductor looks up in its cache.

    It reads ATEN_CPU_CAPABILITY when it writes a kernel, and its cache knows nothing of that: told of
    another one, it takes a kernel for wider vectors, which writes beyond its buffers.
    """
    from torch._inductor import config, cpu_vec_isa  # slow to import, and few compile

    if config.cpp.simdlen is None:
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width()
