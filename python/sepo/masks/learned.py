"""SparsePO's learned masks: two numbers a token, read off the reference's states of every layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sepo.errors import InputError


class SparseMask(nn.Module):
    """The weights that SparsePO gives the reward and the KL divergence of a token (its eq. 9, 10).

    m = ReLU(sum_l wo_l ReLU(w_l . LN(H_l) + b_l)) >= 0, without an upper bound; exact zeros are the
    sparsity. One mask serves both unless `independent`. Raises InputError for states of another
    model.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,  # D_ref
        *,
        independent: bool = False,
        layernorm: bool = True,  # one for all layers; the paper has none, its code does
        binary: bool = False,  # m becomes 1 where it is above 0, its gradient stays m's
    ):
        super().__init__()
        self.settings = dict(
            num_layers=num_layers,
            width=width,
            independent=independent,
            layernorm=layernorm,
            binary=binary,
        )
        self.reward = _Mask(num_layers, width, layernorm)
        self.kl = _Mask(num_layers, width, layernorm) if independent else None

    def forward(
        self,
        states: Tensor,  # (L, M, D_ref), any float dtype; gets no gradient
    ) -> tuple[Tensor, Tensor]:  # m_u and m_d, (M,) float32; the same tensor twice if common
        expected = self.settings["num_layers"], self.settings["width"]
        if states.ndim != 3 or (states.shape[0], states.shape[2]) != expected:
            raise InputError(
                f"mask: expected states of {expected[0]} layers, (M, {expected[1]}) each, "
                f"got {tuple(states.shape)}"
            )
        # bfloat16 would round a mask to 8 bits, and small ones decide the sparsity
        with torch.autocast(states.device.type, enabled=False):
            reward = self._value(self.reward(states.detach()))
            kl = reward if self.kl is None else self._value(self.kl(states.detach()))
        return reward, kl

    def _value(self, mask: Tensor) -> Tensor:
        if not self.settings["binary"]:
            return mask
        return (mask > 0).to(mask) + (mask - mask.detach())  # exactly 0 or 1: the bracket is 0


class _Mask(nn.Module):
    def __init__(self, num_layers: int, width: int, layernorm: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers, width).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(num_layers))
        self.mixer = nn.Parameter(torch.empty(num_layers).normal_(std=0.02))
        self.norm = nn.LayerNorm(width) if layernorm else None

    def forward(self, states: Tensor) -> Tensor:  # (L, M, D_ref) -> (M,)
        # a layer's normalised states are made again in backward: kept in float32 for all layers
        # they would be as large as the logits that the rest of the step avoids
        layers = [
            checkpoint(self._layer, *layer, use_reentrant=False, preserve_rng_state=False)
            for layer in zip(states, self.weight, self.bias, strict=True)
        ]
        mixer = _widened(self.mixer)
        return (mixer @ torch.stack(layers)).relu()

    def _layer(self, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # -> (M,)
        weight, bias = _widened(weight), _widened(bias)
        state = state.to(weight.dtype)
        if self.norm is not None:
            scale, shift = _widened(self.norm.weight), _widened(self.norm.bias)
            state = F.layer_norm(state, weight.shape, scale, shift, self.norm.eps)
        return (state @ weight + bias).relu()


def decayed(mask: SparseMask) -> dict[str, nn.Parameter]:
    """By name, the parameters that weight decay is for: w_l and wo_l, no bias and no LayerNorm."""
    ends = ("weight", "mixer")
    return {
        f"{name}.{end}": getattr(part, end) for name, part in mask.named_children() for end in ends
    }


def _widened(parameter: Tensor) -> Tensor:
    """Sharded training may hand out 16-bit copies; what is computed from them is float32 still."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
