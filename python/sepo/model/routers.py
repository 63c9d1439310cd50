"""The loss by which a mixture of experts keeps its routers balanced, on packed batches.

transformers defines it on the tokens of one forward, as a product of two means over them. A step's
micro-batches must not show in its gradient, so here the forward is a pair's: its two sequences.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.model.base import base_of

NAME = "load_balancing_loss_func"  # of transformers, in every module of such a model
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class RouterLoss:
    """Call it with every layer's router logits of a batch."""

    coefficient: float
    function: Callable
    num_experts: int
    top_k: int

    def __call__(
        self,
        routers: Sequence[Tensor],  # a layer: (N, experts)
        batch: PackedBatch,
    ) -> Tensor:  # (P,) float32
        """Of each pair, what transformers makes of its two sequences in one padded forward.

        A sequence is what the batch reads of it: the prompt, for both responses that the loss uses,
        and each response as far as it was not cut off.
        """
        if not routers:
            raise InputError("output_router_logits: expected router logits of the layers, got none")
        read = (batch.cu_rows.diff() > 0).view(-1, 2).sum(1).clamp(min=1)  # sequences of each pair
        losses = [routers[0].new_empty(0, dtype=torch.float32)]
        for pair, (start, prompt_end, _, end) in enumerate(batch.spans):
            counts = read.new_ones(1, end - start)
            counts[:, : prompt_end - start] = read[pair]
            gates = tuple(logits[start:end] for logits in routers)
            loss = self.function(gates, self.num_experts, self.top_k, counts)
            losses.append(loss.reshape(1).to(torch.float32))
        return torch.cat(losses)


def router_loss(model: nn.Module) -> RouterLoss | None:
    """Read what the model adds to its own loss, if its config asks for it: `output_router_logits`.

    Raises InputError for one that defines it in another way than transformers usually does, and for
    a loss on its logits (Bamba's `z_loss_coefficient`), which rows that are left out would change.
    """
    base = base_of(model)
    config = base.config.get_text_config(decoder=True)
    if z_loss := getattr(base, "z_loss_coefficient", 0):
        raise InputError(
            f"{type(base).__name__}: z_loss_coefficient {z_loss} asks for a loss on the logits of "
            "all tokens, which are not made here; expected 0 in its config.json"
        )
    if not getattr(config, "output_router_logits", False):
        return None

    def first(*names: str) -> Any:
        found = (getattr(owner, name, None) for owner in (base, config) for name in names)
        return next((value for value in found if value is not None), None)

    coefficient = first("router_aux_loss_coef", "aux_loss_coef")
    num_experts = first("num_experts", "num_local_experts")
    top_k = first("num_experts_per_tok")
    function = next(
        (
            f
            for cls in type(base).__mro__
            if (f := getattr(sys.modules[cls.__module__], NAME, None))
        ),
        None,
    )
    known = function is not None and list(inspect.signature(function).parameters) == ARGUMENTS
    if function is None or not known or None in (coefficient, num_experts, top_k):
        raise InputError(
            f"{type(base).__name__}: output_router_logits asks for a loss of its routers that is not "
            f"transformers' {NAME}; expected false in its config.json"
        )
    return RouterLoss(coefficient, function, num_experts, top_k)
