"""The transformers model inside a policy or a reference, and what is kept on it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sepo.model.folder import ModelFolder

if TYPE_CHECKING:

    class Base(PreTrainedModel):
        """A transformers model, and attributes that are kept on it; each is set late or never."""

        packed_attn_impl: str  # the attention that was asked for
        packed_checked: frozenset[tuple[str, torch.dtype, str]]  # device, dtype, attention
        own_attention: str  # which it had before ours
        fused_layers: str  # whose kernels compute them
        merged_from: ModelFolder  # an adapter
        merged_values: dict[str, int]  # of `values_of` it, after the merge

else:
    Base = PreTrainedModel


class Adapted(Protocol):
    """Name what is read of a PeftModel, beside the model in it."""

    peft_config: Mapping[str, Any]

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Make it the model without adapters, for the time of a with statement."""


def base_of(model: nn.Module) -> Base:
    """The transformers model inside a PeftModel, whose adapters are in its layers; else itself."""
    inside = getattr(model, "get_base_model", None)
    # peft is no part of the core, and a module's own type says of any attribute that it is a tensor
    return cast(Base, model if inside is None else inside())


def has_adapters(model: nn.Module) -> bool:
    """Whether the model can do without what is trained: its adapters can be switched off."""
    return hasattr(model, "disable_adapter")


def adapted(model: nn.Module) -> Adapted:
    """A model that `has_adapters`, as what it is."""
    return cast(Adapted, model)  # see base_of
