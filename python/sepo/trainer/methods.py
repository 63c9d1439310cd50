"""Tell training methods apart: one entry of METHODS each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sepo.data.selection import Positions
from sepo.flags.selection import uses_fraction, uses_mass
from sepo.losses import (
    dpo_loss,
    dpop_logratio,
    dpop_loss,
    ipo_loss,
    rrhf_loss,
    sepo_loss,
    simpo_loss,
    sparsepo_loss,
    tdpo_loss,
)
from sepo.masks import AboveQuantile, BelowMean, HighestEntropy
from sepo.model.kept import TokenRule
from sepo.model.reads import Needed, TokenValues
from sepo.ops import segment_sum
from sepo.trainer.config import SePOConfig
from sepo.trainer.inherited import given_of


@dataclass(frozen=True)
class ResponseSums:
    """The same, a number a response: (S,) float32. Segment 2p is chosen, 2p + 1 rejected.

    Sums are weighted by the user's weights, if there are any.
    """

    logp: Tensor  # sum over the used tokens
    tokens: Tensor  # sum of the weights: the number of used tokens if they are ones
    logratio: Tensor | None  # sum of reward_mask * (logp - ref_logp)
    kl: Tensor | None  # sum of kl_mask * kl
    reward_mask: Tensor | None  # sum: the mask's L1 norm
    kl_mask: Tensor | None

    @property
    def empty(self) -> Tensor:  # (P,) bool: a rule left one of the pair's responses no token
        return (self.tokens.view(-1, 2) == 0).any(1)

    @property
    def mean_logp(self) -> Tensor:  # 0 for an empty segment
        return self._mean(self.logp)

    @property
    def mean_logratio(self) -> Tensor:
        return self._mean(self.logratio)

    def _mean(self, total: Tensor) -> Tensor:
        return total / self.tokens.clamp(min=torch.finfo(self.tokens.dtype).tiny)


@dataclass(frozen=True)
class Method:
    """How a method selects, what it needs, and its loss."""

    positions: Positions  # which tokens the loss uses: see Selection
    loss: Callable[[ResponseSums, SePOConfig], Tensor]  # (P,)
    settings: tuple[str, ...] = ()  # flags that loss and mask read: one run has the same all along
    reward: Callable[[ResponseSums, SePOConfig], Tensor] | None = None  # (S,) what rewards/* report
    per: Literal["pair", "token"] = "pair"  # the step's loss is a mean over these
    reference: Needed | None = None
    direction: Callable[[SePOConfig], str] | None = None  # of the KL divergence; None: not needed
    mask: Literal["learned", "activation"] | None = None  # on each token's reward and KL
    rule: Callable[[SePOConfig], TokenRule] | None = None  # which tokens stay; None: all positions

    @property
    def needs_score(self) -> bool:
        return self.positions == "selected"

    def reads(self, args: SePOConfig) -> set[str]:
        """The flags that a run looks at, of those that are not every method's."""
        names = {*self.settings}
        if self.positions in ("selected", "random"):
            names |= {"select", "rejected_select", "rejected_fraction", "first_token"}
            names |= {"fraction"} if uses_fraction(args) else set()
        if self.needs_score and uses_mass(args):
            names |= {"mass"}
        if self.mask == "learned":
            names |= {"mask_learning_rate", "mask_weight_decay"}
        if self.reference is not None:
            names |= {"reference"}
        return names


def reduce_segments(
    tokens: TokenValues,
    weights: Tensor,  # (M,) float32
    cu_rows: Tensor,  # (S + 1,) int32
) -> ResponseSums:
    if tokens.keep is not None:
        weights = weights * tokens.keep

    def total(values: Tensor | None, mask: Tensor | None = None) -> Tensor | None:
        if values is None:
            return None
        return segment_sum(values * weights if mask is None else values * mask * weights, cu_rows)

    ratio = None if tokens.ref_logp is None else tokens.logp - tokens.ref_logp
    return ResponseSums(
        logp=total(tokens.logp),
        tokens=segment_sum(weights, cu_rows),
        logratio=total(ratio, tokens.reward_mask),
        kl=total(tokens.kl, tokens.kl_mask),
        reward_mask=total(tokens.reward_mask),
        kl_mask=total(tokens.kl_mask),
    )


def _sepo(s: ResponseSums, a: SePOConfig) -> Tensor:
    return sepo_loss(s.mean_logp, gamma=a.gamma, margin=a.margin)


def _simpo(s: ResponseSums, a: SePOConfig) -> Tensor:
    return simpo_loss(s.mean_logp, beta=a.beta, margin=a.beta * a.gamma_beta_ratio)


def _confpo(s: ResponseSums, a: SePOConfig) -> Tensor:
    return torch.where(s.empty, 0.0, _simpo(s, a))  # such a pair has no difference to learn from


def _ipo_logratio(s: ResponseSums, a: SePOConfig) -> Tensor:
    return s.mean_logratio if a.ipo_reduce == "mean" else s.logratio


def _rrhf(s: ResponseSums, a: SePOConfig) -> Tensor:
    nll = s.logp if a.sft_reduce == "sum" else s.mean_logp
    return rrhf_loss(s.mean_logp, -nll[0::2], sft_weight=a.sft_weight)


def _masked(s: ResponseSums, a: SePOConfig) -> Tensor:
    return sparsepo_loss(s.logratio, s.kl, beta=a.beta, form=a.form)


def _sparsepo(s: ResponseSums, a: SePOConfig) -> Tensor:
    both = lambda norm: norm[0::2] + norm[1::2]
    l1 = a.mask_l1 * both(s.reward_mask) + a.kl_mask_l1 * both(s.kl_mask)
    return _masked(s, a) + l1


def _masked_reward(s: ResponseSums, a: SePOConfig) -> Tensor:
    return a.beta * (s.logratio + (s.kl if a.form == "released" else -s.kl))


_LEARNED = "mask_kind", "independent_masks", "mask_layernorm", "mask_l1", "kl_mask_l1"
_FORWARD, _REVERSE = "ref||policy", "policy||ref"
_SEPO = Method(
    positions="selected",
    loss=_sepo,
    settings=("gamma", "margin"),
    reward=lambda s, a: a.gamma * s.mean_logp,
)
_DPO = Method(
    positions="all",
    loss=lambda s, a: dpo_loss(s.logratio, beta=a.beta, label_smoothing=a.label_smoothing),
    settings=("beta", "label_smoothing"),
    reward=lambda s, a: a.beta * s.logratio,
    reference="logp",
)
_SIMPO = Method(
    positions="all",
    loss=_simpo,
    settings=("beta", "gamma_beta_ratio"),
    reward=lambda s, a: a.beta * s.mean_logp,
)
_MASKED = dict(
    positions="all",
    reward=_masked_reward,
    reference="layers",
    direction=lambda a: _FORWARD if a.form == "released" else _REVERSE,
)
METHODS = {
    "sft": Method(
        positions="chosen",
        loss=lambda s, a: -s.logp[0::2],
        per="token",
    ),
    "dpo": _DPO,
    "selective-dpo": replace(
        _DPO,
        settings=(*_DPO.settings, "selection_quantile"),
        rule=lambda a: AboveQuantile(a.selection_quantile),
    ),
    "ipo": Method(
        positions="all",
        loss=lambda s, a: ipo_loss(_ipo_logratio(s, a), beta=a.beta),
        settings=("beta", "ipo_reduce"),
        reward=lambda s, a: a.beta * _ipo_logratio(s, a),
        reference="logp",
    ),
    "dpop": Method(
        positions="all",
        loss=lambda s, a: dpop_loss(s.logratio, beta=a.beta, penalty=a.dpop_lambda),
        settings=("beta", "dpop_lambda"),
        reward=lambda s, a: a.beta * dpop_logratio(s.logratio, a.dpop_lambda),
        reference="logp",
    ),
    "tdpo1": Method(
        positions="all",
        loss=lambda s, a: tdpo_loss(s.logratio, s.kl, beta=a.beta, variant=1),
        settings=("beta",),
        reward=lambda s, a: a.beta * (s.logratio + s.kl),
        reference="hidden",
        direction=lambda a: _FORWARD,
    ),
    "tdpo2": Method(
        positions="all",
        loss=lambda s, a: tdpo_loss(s.logratio, s.kl, beta=a.beta, variant=2, alpha=a.tdpo2_alpha),
        settings=("beta", "tdpo2_alpha"),
        reward=lambda s, a: a.beta * (s.logratio + a.tdpo2_alpha * s.kl),
        reference="hidden",
        direction=lambda a: _FORWARD,
    ),
    "sparsepo": Method(
        loss=_sparsepo, mask="learned", settings=("beta", "form", *_LEARNED), **_MASKED
    ),
    "mapo": Method(
        loss=_masked, mask="activation", settings=("beta", "form", "mask_norm"), **_MASKED
    ),
    "simpo": _SIMPO,
    "confpo": replace(_SIMPO, loss=_confpo, rule=lambda a: BelowMean()),
    "rrhf": Method(
        positions="all",
        loss=_rrhf,
        settings=("sft_weight", "sft_reduce"),
        reward=lambda s, a: s.mean_logp,
    ),
    "sepo": _SEPO,
    "sepo-rand": replace(_SEPO, positions="random"),
    "sepo-entropy": replace(
        _SEPO,
        positions="all",
        settings=(*_SEPO.settings, "fraction"),
        rule=lambda a: HighestEntropy(a.fraction),
    ),
}


def idle_settings(args: SePOConfig) -> list[str]:
    """In words: flags that were given, but are of other methods or of another selection."""
    method = METHODS[args.method]
    reads = method.reads(args)
    others = {name for method in METHODS.values() for name in method.reads(args)} - reads
    if args.kl_mask_l1 == args.mask_l1:  # what it is where it wasn't given
        others -= {"kl_mask_l1"}
    if method.needs_score:  # then it is the selection that has no use for it
        others -= {"fraction"}
    given = given_of(args, *sorted(others))
    notes = [f"--{name} does nothing with --method {args.method}" for name in given]
    if "mass" not in reads and given_of(args, "mass"):
        notes.append("--mass does nothing without --select mass")
    if method.needs_score and "fraction" not in reads and given_of(args, "fraction"):
        notes.append("--fraction does nothing with --select mass")
    if args.rejected_select == "mass" and args.rejected_fraction is not None:
        notes.append("--rejected_fraction does nothing with --rejected_select mass")
    return notes
