"""One set of weights, gradients and optimiser states, which all contenders train in turn.

A copy for each would not fit into memory, and would let each meet other weights in its cache.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LEARNING_RATE = 1e-6  # small: nobody's step may change what the others compute


class Weights:
    """The policy of all contenders, the reference, and the end of a step."""

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
