"""What distinguishes one training method from another: one line of METHODS each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sepo.config import SePOConfig
from sepo.losses import dpo_loss, sepo_loss, simpo_loss
from sepo.ops import segment_sum


@dataclass(frozen=True)
class Segments:
    """One micro-batch after the head: a number a segment. Segment 2p is chosen, 2p + 1 rejected."""

    logp: Tensor  # (S,) float32, weighted sum over the used tokens
    ref_logp: Tensor | None  # (S,) float32, the same sum under the reference
    tokens: Tensor  # (S,) float32, sum of the weights: the number of used tokens if they are ones

    @property
    def score(self) -> Tensor:  # (S,) mean log-probability; 0 for an empty segment
        return self.logp / self.tokens.clamp(min=torch.finfo(self.tokens.dtype).tiny)

    @property
    def logratio(self) -> Tensor:  # (S,)
        assert self.ref_logp is not None
        return self.logp - self.ref_logp


@dataclass(frozen=True)
class Method:
    """How a method selects, what it needs, and its loss."""

    positions: Literal["selected", "random", "all", "chosen"]  # which tokens the loss uses
    loss: Callable[[Segments, SePOConfig], Tensor]  # (P,)
    reward: Callable[[Segments, SePOConfig], Tensor] | None = None  # (S,) what rewards/* report
    per: Literal["pair", "token"] = "pair"  # the step's loss is a mean over these
    needs_reference: bool = False

    @property
    def needs_score(self) -> bool:
        return self.positions == "selected"


def reduce_segments(
    logp: Tensor,  # (M,) float32
    weights: Tensor,  # (M,) float32
    ref_logp: Tensor | None,  # (M,) float32
    cu_rows: Tensor,  # (S + 1,) int32
) -> Segments:
    return Segments(
        logp=segment_sum(logp * weights, cu_rows),
        ref_logp=None if ref_logp is None else segment_sum(ref_logp * weights, cu_rows),
        tokens=segment_sum(weights, cu_rows),
    )


_sepo = lambda s, a: sepo_loss(s.score, gamma=a.gamma, margin=a.margin)
_sepo_reward = lambda s, a: a.gamma * s.score
METHODS = {
    "sft": Method(
        positions="chosen",
        loss=lambda s, a: -s.logp[0::2],
        per="token",
    ),
    "dpo": Method(
        positions="all",
        loss=lambda s, a: dpo_loss(s.logratio, beta=a.beta, label_smoothing=a.label_smoothing),
        reward=lambda s, a: a.beta * s.logratio,
        needs_reference=True,
    ),
    "simpo": Method(
        positions="all",
        loss=lambda s, a: simpo_loss(s.score, beta=a.beta, margin=a.beta * a.gamma_beta_ratio),
        reward=lambda s, a: a.beta * s.score,
    ),
    "sepo": Method(positions="selected", loss=_sepo, reward=_sepo_reward),
    "sepo-rand": Method(positions="random", loss=_sepo, reward=_sepo_reward),
}
