"""The models of a step, and the one set of weights that all its contenders train in turn."""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.steps.pairs import ROOT
from sepo.cost import decoder
from sepo.demo.smollm2 import find_gguf, save_smollm2
from sepo.errors import InputError

SMOLLM2 = "smollm2"
TRAINERS = str(ROOT / "runs/bench/trainers")  # made by each, and written to by none: no loop runs
LEARNING_RATE = 1e-6  # small: nobody's step may change what the others compute
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
    # a quarter as deep: with AdamW's moments in float32 all of it would fill the largest GPU
    "llama-8b-shape-8-layers": dict(
        decoder.SHAPES["LLaMA3-8B"][1], num_hidden_layers=8, max_position_embeddings=8192
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
    path = save_smollm2(ROOT / "runs" / SMOLLM2) if name == SMOLLM2 else name
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


class Weights:
    """The policy of all contenders, the reference, and the end of a step.

    A copy for each would not fit into memory, and would let each meet other weights in its cache.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.train()
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self.reference = elsewhere(model)

    def twin(self) -> PreTrainedModel:
        """A module of its own (its attention, its forward, its config) on the same parameters."""
        return twin(self.model)

    def add(self, name: str, module: nn.Module) -> None:
        """A further submodule that is trained, as a method's mask is; later twins have it too."""
        setattr(self.model, name, module)
        self.parameters = list(self.model.parameters())
        self.optimizer.add_param_group({"params": list(module.parameters())})

    def finish(self) -> None:
        """What transformers' Trainer does after the gradients: clip, AdamW, clear."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def take_gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.parameters]
        self.optimizer.zero_grad()
        return found

    @property
    def static_bytes(self) -> int:
        """Weights, gradients and two moments."""
        return 4 * num_bytes(self.model)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another module on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def elsewhere(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen reference near the policy: at the policy itself every DPO loss would be log 2."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    for p in reference.parameters():
        noise = torch.empty_like(p).normal_(generator=generator)
        p.add_(noise, alpha=0.02 * p.std().item() if p.numel() > 1 else 0.0)
    return reference


def num_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
