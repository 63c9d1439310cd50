"""What is done to the layers of a model before it is trained."""

from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero, attention's included, adapters' not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def compile_layers(model: nn.Module, plugin: TorchDynamoPlugin) -> None:
    """Compile the parts of every decoder layer in place: names in the state dict stay as they are.

    Parts, because activation checkpointing wraps a layer and the compiler does not look through
    it: compiled parts are recomputed as they ran first. All layers share the code of one, and
    sizes are dynamic from the start, or the second batch would compile everything again.
    """
    kwargs = plugin.to_kwargs() | {"dynamic": True, "fullgraph": False}
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                if next(part.parameters(), None) is not None:  # a dropout is not worth a graph
                    part.compile(**kwargs)
