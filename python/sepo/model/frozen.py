"""Read a reference inside a step: from what a store keeps of it, or by running it, frozen."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sepo.data.hidden import StoredHead
from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.model.base import adapted
from sepo.model.forward import Head, head, hidden_states, token_logprob, under_autocast
from sepo.ops import LogprobKL, selected_logprob_kl


class CachedReference:
    """Read a reference from what a scored store keeps; pairs carry the rest into the batch."""

    def __init__(self, stored: StoredHead | None):  # None: only log-probabilities are kept
        self.stored = stored
        self._head: Head | None = None

    def head(self, like: Tensor) -> Head:
        """The head in `like`'s dtype and on its device; moved there once."""
        if self.stored is None:
            raise InputError(
                "expected a store with the reference's hidden rows (`sepo score --keep hidden`), "
                "got one with log-probabilities alone"
            )
        if self._head is None or _kind(self._head.weight) != _kind(like):
            self._head = _like(self.stored, like)
        return self._head

    def hidden(self, batch: PackedBatch, like: Tensor) -> Tensor:  # (N, D_ref)
        """The cached rows where the batch reads them; the other rows hold anything."""
        rows = like.new_empty(len(batch.tokens), self.head(like).weight.shape[1])
        if batch.ref_hidden is not None:
            # a row that is read twice is the prompt's last: both responses cached the same state
            rows[batch.rows] = batch.ref_hidden.to(like)
        elif len(batch.rows):
            raise InputError("expected pairs with the reference's hidden rows, got some without")
        return rows


@dataclass(frozen=True)
class LiveReference:
    """Run a prepared model beside the policy, without gradients."""

    model: nn.Module  # a PreTrainedModel, or a PeftModel
    without_adapters: bool = False  # the policy itself, as it was before LoRA

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The model as the reference, for the time of one reading."""
        with (
            torch.no_grad(),
            adapted(self.model).disable_adapter() if self.without_adapters else nullcontext(),
        ):
            yield self.model

    def logp(self, batch: PackedBatch, *, budget: int | None = None) -> Tensor:  # (M,) float32
        with self.frozen() as model:
            return token_logprob(model, batch, budget=budget)

    def head(self, like: Tensor) -> Head:
        with self.frozen() as model:
            return _like(head(model), like)

    def hidden(self, batch: PackedBatch, like: Tensor) -> Tensor:  # (N, D_ref)
        with self.frozen() as model:
            return hidden_states(model, batch).to(like)


Reference = CachedReference | LiveReference


def token_logprob_kl(
    model: nn.Module,  # of transformers, or a PeftModel around one
    batch: PackedBatch,
    reference: Reference,
    *,
    ref_hidden: Tensor | None = None,  # (N, D_ref) its states, where they were read already
    direction: str = "ref||policy",  # or "policy||ref"
    budget: int | None = None,  # bytes, see selected_logprob_kl
    impl: str = "auto",
    routers: list[Tensor] | None = None,  # the policy's, see hidden_states
) -> LogprobKL:  # logp, ref_logp, kl: (M,) float32, nats
    """Both models' log-probability of every selected token, and the KL divergence at its row.

    Gradients reach the policy alone. Cached rows are bfloat16: the result is that of a live
    reference whose states are rounded to it. Call it inside the wrapped module's forward, as
    `token_logprob`. Raises InputError for a reference whose head does not fit the policy's.
    """
    hidden = hidden_states(model, batch, routers=routers)
    hidden, own = under_autocast(hidden, head(model))
    ref = reference.head(hidden)
    check_heads(own, ref)
    if ref_hidden is None:
        ref_hidden = reference.hidden(batch, hidden)
    return selected_logprob_kl(
        hidden,
        own.weight,
        ref_hidden.to(hidden),
        ref.weight,
        batch.rows,
        batch.targets,
        direction=direction,
        bias=own.bias,
        ref_bias=ref.bias,
        scale=own.scale,
        softcap=own.softcap,
        budget=budget,
        impl=impl,
    )


def check_heads(own: Head, ref: Head | StoredHead) -> None:
    """Raise InputError for a reference whose logits can't be compared with the policy's."""
    vocabulary = len(own.weight), len(ref.weight)
    pairs = {
        "vocabulary": vocabulary,
        "logit scale": (own.scale, ref.scale),
        "logit soft cap": (own.softcap, ref.softcap),
    }
    for word, (expected, got) in pairs.items():
        if expected != got:
            raise InputError(f"reference: expected the policy's {word}, {expected}, got {got}")


def _like(own: StoredHead | Head, like: Tensor) -> Head:
    bias = None if own.bias is None else own.bias.to(like)
    return Head(own.weight.to(like), bias, own.scale, own.softcap)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
