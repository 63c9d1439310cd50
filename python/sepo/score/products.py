"""A float32 model whose matrix products are made of short halves: bfloat16's, or TF32's."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sepo.errors import InputError
from sepo.model.base import base_of
from sepo.model.forward import Head, head
from sepo.model.prepare import prepare_if_new
from sepo.ops import SplitWeight, explain_split_linear, split_linear, split_logprob, split_weight

HALVES = {"split": "bfloat16", "tf32x3": "tf32"}  # arithmetic -> what a half is
# kinds of layers whose products are made of halves -> their weight as (outputs, inputs)
LINEAR: dict[type[nn.Module], Callable] = {
    nn.Linear: lambda layer: layer.weight,
    Conv1D: lambda layer: layer.weight.T,  # GPT-2's
}


class SplitProducts:
    """Make the products of a model's linear layers and of its head from halves, made here once.

    Attention's products, norms and rotations stay float32, and so do the products of experts that
    are no layers of their own. The halves lie beside the float32 weights: 2 or 4 bytes a number
    (TF32: 4 or 8).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arithmetic: str,
        others: Iterable["SplitProducts"] = (),  # of models that may share weights with this one
    ):
        """Raises InputError for a model that is not float32, and for a device without such products.

        A CPU without bfloat16 instructions makes the same products in float32, which takes longer.
        """
        if model.dtype != torch.float32:
            raise InputError(f"{arithmetic}: expected a float32 model, got {model.dtype}")
        reason = why_slow(arithmetic, model.device)
        if reason and not (arithmetic == "split" and model.device.type == "cpu"):
            raise InputError(f"{arithmetic}: expected a device that has its products, got {reason}")
        self.arithmetic = arithmetic
        same = [other for other in others if other.arithmetic == arithmetic]
        made = {weight: halves for other in same for weight, halves in other._halves.items()}
        self._halves: dict[Tensor, SplitWeight] = {}  # by the weight that they are of

        def halved(weight: Tensor, matrix: Tensor) -> SplitWeight:
            found = made.get(weight)
            found = split_weight(matrix, kind=HALVES[arithmetic]) if found is None else found
            return self._halves.setdefault(weight, found)

        trunk = base_of(prepare_if_new(model)).get_decoder().modules()
        self._layers: dict[nn.Module, SplitWeight] = {
            layer: halved(layer.get_parameter("weight"), LINEAR[type(layer)](layer))
            for layer in trunk
            if type(layer) in LINEAR
        }
        self._head: Head = head(model)
        self._head_weight = halved(self._head.weight, self._head.weight)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the model's linear layers use the halves; outside of it they are as before."""
        for layer, weight in self._layers.items():
            layer.forward = partial(_linear, layer, weight)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def logprob(
        self,
        states: Tensor,  # (N, D) float32
        rows: Tensor,  # (M,)
        targets: Tensor,  # (M,)
    ) -> Tensor:  # (M,) float32
        """log p(targets) of the head."""
        _, bias, scale, softcap = self._head
        return split_logprob(
            states, self._head_weight, rows, targets, bias=bias, scale=scale, softcap=softcap
        )

    @property
    def layers(self) -> int:
        """How many layers have halves, the head included."""
        return len(self._layers) + 1

    @property
    def of_two(self) -> int:
        """How many of them take two products, because their weights are exact in a half."""
        return sum(w.products == 2 for w in (*self._layers.values(), self._head_weight))


def why_slow(arithmetic: str, device: torch.device) -> str | None:
    """Why `device` has no products of the halves of an arithmetic, or None: it has."""
    if device.type not in ("cpu", "cuda"):
        return f"a {device.type}, for which there is no kernel"
    one = torch.zeros((1, 1), device=device)
    found = explain_split_linear(one, split_weight(one, kind=HALVES[arithmetic]))
    return found.reasons[1] if found.emulated else None


def _linear(layer: nn.Module, weight: SplitWeight, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    bias = None if layer.bias is None else layer.get_parameter("bias")
    return split_linear(rows, weight, bias=bias).view(*x.shape[:-1], weight.hi.shape[0])
