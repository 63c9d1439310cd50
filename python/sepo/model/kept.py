"""Select first, compute after: a rule that reads the policy leaves few rows for the gradient."""

from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sepo.data.types import PackedBatch
from sepo.model.forward import head, hidden_states, under_autocast
from sepo.ops import selected_logprob, selected_stats


class TokenRule(Protocol):
    """Choose the tokens that stay in the loss, at every step; `sepo.masks` has the kinds."""

    needs_entropy: ClassVar[bool]  # of the policy's whole distribution at each token

    def keep(
        self, logp: Tensor, ref_logp: Tensor | None, entropy: Tensor | None, cu_rows: Tensor
    ) -> Tensor:
        """(M,) bool of both models' log-probabilities and the policy's entropies, nats, (M,) each.

        None of them has a gradient.
        """


def kept_logprob(
    model: PreTrainedModel,
    batch: PackedBatch,
    rule: TokenRule,
    ref_logp: Tensor | None,  # (M,)
    *,
    budget: int | None = None,  # bytes, see selected_logprob
    routers: list[Tensor] | None = None,  # see hidden_states
) -> tuple[Tensor, Tensor]:  # (M,) float32, differentiable where kept; (M,) bool
    """Apply the head without a gradient at every row, and with one at those that the rule keeps.

    That is 1 + 3 f products of the head in place of 3, where f is the share that is kept, and 1 of
    them under no_grad. How many rows that are is read back from the device, once a micro-batch.
    """
    hidden = hidden_states(model, batch, routers=routers)
    hidden, (weight, bias, scale, softcap) = under_autocast(hidden, head(model))
    apply_head = partial(
        selected_logprob, hidden, weight, bias=bias, scale=scale, softcap=softcap, budget=budget
    )
    entropy = None
    with torch.no_grad():
        if rule.needs_entropy:  # in the same product
            stats = selected_stats(
                hidden, weight, batch.rows, batch.targets,
                bias=bias, scale=scale, softcap=softcap, budget=budget,
            )  # fmt: skip
            logp, entropy = stats.logp, stats.entropy
        else:
            logp = apply_head(batch.rows, batch.targets)
        keep = rule.keep(logp, ref_logp, entropy, batch.cu_rows)
    if not torch.is_grad_enabled():
        return logp, keep
    kept = keep.nonzero().squeeze(1)
    differentiable = apply_head(batch.rows[kept], batch.targets[kept])
    return logp.index_copy(0, kept, differentiable), keep
