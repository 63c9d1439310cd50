"""Where a method's masks come from: drawn with the pairs, learned, or the reference's activations.

Each is a `sepo.model.reads.TokenMasks`: `read` looks at the reference before the policy runs, `weigh`
makes the masks of what it saw.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.masks.activation import activation_mask
from sepo.masks.readers import layer_activations, layer_states
from sepo.model.frozen import LiveReference, Reference

MASK = "sparse_mask"  # the policy's submodule: only so do DDP and FSDP2 see its parameters


class DrawnMasks:
    """SparsePO's ablation: random numbers, one mask for both."""

    def read(self, reference, batch: PackedBatch) -> tuple[None, None]:
        return None, None

    def weigh(self, policy, batch: PackedBatch, read) -> tuple[Tensor, Tensor]:
        drawn = batch.weights if batch.mask is None else batch.mask  # None: a batch of no pairs
        return drawn, drawn


class LearnedMasks:
    """SparsePO's: the policy's own submodule reads the states of the reference's layers."""

    def read(self, reference: Reference, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with _live(reference).frozen() as model:
            return layer_states(model, batch)

    def weigh(
        self, policy: PreTrainedModel, batch: PackedBatch, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        return getattr(policy, MASK)(read)


@dataclass(frozen=True)
class ActivationMasks:
    """MaPO's: the reference's activations, one mask for both."""

    norm: Literal["minmax", "zscore"]

    def read(self, reference: Reference, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with _live(reference).frozen() as model:
            return layer_activations(model, batch)

    def weigh(self, policy, batch: PackedBatch, read: Tensor) -> tuple[Tensor, Tensor]:
        mask = activation_mask(read, batch.cu_rows, norm=self.norm)
        return mask, mask


def _live(reference: Reference) -> LiveReference:
    if not isinstance(reference, LiveReference):
        raise InputError("expected a live reference, whose layers the masks read, got cached rows")
    return reference
