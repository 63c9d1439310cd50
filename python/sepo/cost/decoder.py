"""Count what a decoder computes a token, from its modules: no weight has to exist."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from sepo.errors import InputError


class Passes(NamedTuple):
    """Numbers that a layer's norms, activations, rotations and sums read or write, a token.

    Counted in eager PyTorch with 16-bit weights, in 16-bit numbers; a fused norm needs fewer.
    tests/bench/test_step_cost.py counts them again.
    """

    forward: tuple[float, float]  # in units of the model's width, of the feed-forward's width
    backward: tuple[float, float]


RMS_NORM = Passes((63.4, 5), (140.6, 9))  # which goes by way of float32, and a gated feed-forward
LAYER_NORM = Passes((21.3, 2), (48.4, 4))


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder with one kind of layer. "Weights" are those of matrix products."""

    layers: int
    width: int  # D
    inner: int  # of the feed-forward
    vocabulary: int  # V
    query_width: int  # heads times their width
    key_width: int
    weights: int  # of all layers
    ends: int  # inputs and outputs of the layers' products: numbers read and written a token
    last_weights: int  # of each layer's last product, which checkpointing does not compute again
    parameters: int  # all that there are, embeddings too
    passes: Passes

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Decoder":
        """Raises InputError for a mixture of experts, whose tokens do not read every weight."""
        config = model.config.get_text_config(decoder=True)
        if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts")):
            raise InputError(f"{config.model_type}: expected a dense decoder, got experts")
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        products = [m for m in _products(model) if m is not head]
        last = [_products(layer)[-1:] for layer in layers]
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        rms = any(type(m).__name__.endswith("RMSNorm") for m in model.modules())
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=inner or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            query_width=heads * width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * width,
            weights=sum(m.weight.numel() for m in products),
            ends=sum(sum(m.weight.shape) for m in products),
            last_weights=sum(m.weight.numel() for one in last for m in one),
            parameters=sum(p.numel() for p in model.parameters()),
            passes=RMS_NORM if rms else LAYER_NORM,
        )

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "Decoder":
        with torch.device("meta"):
            return cls.of(AutoModelForCausalLM.from_config(config))

    def adapter_weights(self, rank: int) -> int:
        """Weights of LoRA adapters on all products of the layers."""
        return rank * self.ends

    def elementwise(self, passes: tuple[float, float]) -> float:
        """Bytes a token, in all layers."""
        return 2 * self.layers * (passes[0] * self.width + passes[1] * self.inner)


def _products(module: nn.Module) -> list[nn.Linear | Conv1D]:
    kinds = nn.Linear | Conv1D
    return [m for m in module.modules() if isinstance(m, kinds) and m.weight.ndim == 2]


def _llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int):
    return "llama", dict(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocabulary,
        tie_word_embeddings=False,
    )  # fmt: skip


def _pythia(width: int, layers: int, heads: int, vocabulary: int):
    return "gpt_neox", dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip


# the policies of SePO's Table 1, and small models that serve as oracles: those of its Table 5
SHAPES = {
    "Pythia-2.8B": _pythia(2560, 32, 32, 50304),
    "Pythia-6.9B": _pythia(4096, 32, 32, 50432),
    "LLaMA2-7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "LLaMA2-13B": _llama(5120, 13824, 40, 40, 40, 32000),
    "LLaMA3-8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Pythia-70M": _pythia(512, 6, 8, 50304),
    "Pythia-160M": _pythia(768, 12, 12, 50304),
    "Pythia-410M": _pythia(1024, 24, 16, 50304),
    "Pythia-1B": _pythia(2048, 16, 8, 50304),
    "Pythia-1.4B": _pythia(2048, 24, 16, 50304),
    "Mistral-7B": _llama(4096, 14336, 32, 32, 8, 32000),
    "TinyLlama-1.1B": _llama(2048, 5632, 22, 32, 4, 32000),
}
TABLE_1 = tuple(SHAPES)[:5]


def named(name: str) -> Decoder:
    """A shape of SHAPES, or what a directory's config.json describes; nothing is downloaded."""
    if name in SHAPES:
        kind, sizes = SHAPES[name]
        return Decoder.from_config(AutoConfig.for_model(kind, **sizes))
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        known = ", ".join(SHAPES)
        raise InputError(f"expected a model's directory or one of {known}, got {name}") from error
    return Decoder.from_config(config)
