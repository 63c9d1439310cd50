"""Answer `model(batch=...)` inside the model's forward: with all that a loss reads of a token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.model.forward import restore_attention, token_logprob
from sepo.model.frozen import LiveReference, Reference, token_logprob_kl
from sepo.model.kept import TokenRule, kept_logprob
from sepo.model.routers import RouterLoss

# of its reference: its log-probabilities; its whole distribution, by way of its hidden rows; the
# states inside every layer too, which only a live reference has
Needed = Literal["logp", "hidden", "layers"]


class TokenValues(NamedTuple):
    """One micro-batch after the head: a number a used token, float32."""

    logp: Tensor  # (M,) nats
    ref_logp: Tensor | None = None  # (M,) the same of the reference
    kl: Tensor | None = None  # (M,) divergence of policy and reference at the token's row, nats
    reward_mask: Tensor | None = None  # (M,) >= 0, SparsePO's m_u; None: ones
    kl_mask: Tensor | None = None  # (M,) >= 0, its m_d
    router_loss: Tensor | None = None  # (P,) of a mixture of experts, before its coefficient
    keep: Tensor | None = None  # (M,) bool: whether a rule leaves the token in the loss; None: all


class TokenMasks(Protocol):
    """Masks on every token's reward and KL divergence; `sepo.masks` has the kinds."""

    def read(self, reference: Reference, batch: PackedBatch) -> tuple[Tensor | None, Any]:
        """The reference's states (N, D_ref), and what `weigh` takes; None where it has no need."""

    def weigh(
        self, policy: PreTrainedModel, batch: PackedBatch, read: Any
    ) -> tuple[Tensor, Tensor]:
        """The reward's mask and the KL divergence's, (M,) each."""


@dataclass(frozen=True)
class Reads:
    """Say what a loss reads of a micro-batch: one for a run."""

    method: str = ""  # for messages
    needed: Needed | None = None  # of the reference
    reference: Reference | None = None
    direction: str | None = None  # of the KL divergence; None: not read
    masks: TokenMasks | None = None  # beside a KL divergence
    rule: TokenRule | None = None  # without one
    router_loss: RouterLoss | None = None
    budget: int | None = None  # bytes, see selected_logprob

    def ref_logp(self, batch: PackedBatch) -> Tensor | None:  # (M,)
        """The batch's, or the live reference's; None for a loss without a reference."""
        if self.needed is None or batch.ref_logp is not None:
            return batch.ref_logp
        if not isinstance(self.reference, LiveReference):
            raise InputError(no_reference(self.method, self.needed))
        return self.reference.logp(batch, budget=self.budget)

    def whole_reference(self) -> Reference:
        """The one whose distribution the KL divergence is to."""
        if self.reference is None:
            raise InputError(no_reference(self.method, self.needed or "hidden"))
        return self.reference


def no_reference(method: str, needed: Needed) -> str:
    ways = {
        "logp": "pairs with cached log-probabilities (`sepo score --keep logp`), or reference_model=",
        "hidden": "a store with cached states (`sepo score --keep hidden`), or reference_model=",
        "layers": "reference_model=",
    }
    return f"--method {method} needs a reference: {ways[needed]}"


def forward_of(cls: type[PreTrainedModel]) -> Callable:
    """The forward of a prepared model: its class's, but for a batch.

    `model(batch=batch)` returns `token_logprob(model, batch)`, and with `reads` the TokenValues
    that a loss wants.
    """

    @wraps(cls.forward)  # its signature decides what `generate` hands over: masks, position ids
    def forward(
        self,
        *args,
        batch: PackedBatch | None = None,
        reads: Reads | None = None,
        **kwargs,
    ):
        if batch is None:
            restore_attention(self)
            return type(self).forward(self, *args, **kwargs)
        if reads is None:
            return token_logprob(self, batch)
        routers: list[Tensor] | None = None if reads.router_loss is None else []
        if reads.rule is not None:
            ref_logp = reads.ref_logp(batch)
            logp, keep = kept_logprob(
                self, batch, reads.rule, ref_logp, budget=reads.budget, routers=routers
            )
            values = TokenValues(logp, ref_logp, keep=keep)
        elif reads.direction is None:
            logp = token_logprob(self, batch, budget=reads.budget, routers=routers)
            values = TokenValues(logp, reads.ref_logp(batch))
        else:
            ref_hidden = of_layers = None
            reference = reads.whole_reference()
            if reads.masks is not None:
                ref_hidden, of_layers = reads.masks.read(reference, batch)
            both = token_logprob_kl(
                self,
                batch,
                reference,
                ref_hidden=ref_hidden,
                direction=reads.direction,
                budget=reads.budget,
                routers=routers,
            )
            values = TokenValues(*both)
            # masks last: backward takes what came last first, and has let go of the layers that
            # they read before it is in the trunk
            if reads.masks is not None:
                reward_mask, kl_mask = reads.masks.weigh(self, batch, of_layers)
                values = values._replace(reward_mask=reward_mask, kl_mask=kl_mask)
        if reads.router_loss is not None and routers is not None:
            values = values._replace(router_loss=reads.router_loss(routers, batch))
        return values

    return forward
