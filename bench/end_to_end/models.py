"""The models of the race, and the pairs that go with them."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.end_to_end import rows
from sepo.data.types import TokenPair
from sepo.demo.smollm2 import find_gguf, save_smollm2
from sepo.errors import InputError

SMOLLM2 = "smollm2"
# shapes alone, with random weights: nothing has to be downloaded
SHAPES = {
    "smollm2-shape": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-1b-shape": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    # as wide as Llama-3.1-8B and a quarter as deep: with AdamW's moments in float32 all of it
    # would fill the largest GPU
    "llama-8b-shape-8-layers": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def load(
    name: str, device: str
) -> tuple[PreTrainedModel, object | None]:  # float32; a tokenizer where the model is real
    """`smollm2`, a shape, or a directory or hub id."""
    if name in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.for_model("llama", **SHAPES[name])
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32), None
    path = save_smollm2(rows.ROOT / "runs" / SMOLLM2) if name == SMOLLM2 else name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(path)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute each layer in backward, as Trainer's loop would switch it on."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()  # the name depends on the version


def smollm2_here() -> str:
    """The real one where its package is, else its shape."""
    try:
        find_gguf()
    except InputError:
        return "smollm2-shape"
    return SMOLLM2


def pairs(
    source: Path | None, tokenizer, vocab_size: int, max_length: int, count: int
) -> tuple[list[TokenPair], str]:  # what is known of them
    """Real ones for a model with a tokenizer, drawn ones for a shape."""
    if tokenizer is None:
        return rows.drawn_pairs(count, vocab_size, max_length), f"{count} drawn pairs"
    return rows.real_pairs(source or rows.default_source(), tokenizer, max_length)
