"""Selection rules without an oracle: which tokens stay in the loss, read off the policy itself.

Each is a `sepo.model.reads.TokenRule`. It chooses anew at every step, from values that have no
gradient. A value that is not a number is kept, so that the loss shows it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sepo.masks.segments import segment_of
from sepo.ops import segment_mean, segment_topk


@dataclass(frozen=True)
class BelowMean:
    """ConfPO's: the tokens that the policy is less sure of than on average."""

    needs_entropy: ClassVar[bool] = False

    def keep(
        self, logp: Tensor, ref_logp: Tensor | None, entropy: Tensor | None, cu_rows: Tensor
    ) -> Tensor:
        return below_mean_probability(logp, cu_rows)


@dataclass(frozen=True)
class AboveQuantile:
    """Selective-DPO's: the tokens on which the policy lags most behind its reference.

    Their score is ref - policy in a chosen response, policy - ref in a rejected one.
    """

    quantile: float  # of a response's scores, in [0, 1]
    needs_entropy: ClassVar[bool] = False

    def keep(
        self, logp: Tensor, ref_logp: Tensor | None, entropy: Tensor | None, cu_rows: Tensor
    ) -> Tensor:
        if ref_logp is None:
            raise ValueError("expected the reference's log-probabilities, got none")
        rejected = segment_of(cu_rows, len(logp)) % 2 == 1
        gap = ref_logp - logp
        return above_quantile(torch.where(rejected, -gap, gap), cu_rows, self.quantile)


@dataclass(frozen=True)
class HighestEntropy:
    """The tokens before which the policy is least decided: "80/20" (arXiv 2506.01939) on pairs."""

    fraction: float  # of a response's tokens, in (0, 1], as `segment_topk` rounds it
    needs_entropy: ClassVar[bool] = True

    def keep(
        self, logp: Tensor, ref_logp: Tensor | None, entropy: Tensor | None, cu_rows: Tensor
    ) -> Tensor:
        if entropy is None:
            raise ValueError("expected the policy's entropies, got none")
        entropy = entropy.nan_to_num(nan=torch.inf)  # segment_topk ranks what is no number last
        keep = torch.zeros_like(entropy, dtype=torch.bool)
        keep[segment_topk(entropy, cu_rows, self.fraction, "highest").indices.long()] = True
        return keep


def below_mean_probability(
    logp: Tensor,  # (M,) float32 or float64, nats
    cu_rows: Tensor,  # (S + 1,) int32, from 0 to M
) -> Tensor:  # (M,) bool
    """Return which tokens are less probable than their response's tokens are on average.

    ConfPO (arXiv 2506.08712): p_t < mean_t p_t, strictly, of probabilities and not of their
    logarithms. So a response whose tokens are all as probable as each other keeps none; so does a
    response of one token. The mean is over the tokens that the user's weights leave in, each
    counted once.
    """
    probability, segment = logp.exp().double(), segment_of(cu_rows, len(logp))
    # over the first token's: a rounded mean of equal numbers may be above them, that of zeros is 0
    excess = probability - probability[cu_rows[segment]]
    return ~(excess >= segment_mean(excess, cu_rows)[segment])


def above_quantile(
    score: Tensor,  # (M,) floating point
    cu_rows: Tensor,  # (S + 1,) int32, from 0 to M
    quantile: float,  # in [0, 1]
) -> Tensor:  # (M,) bool
    """Return which tokens score at least the quantile of their response's T scores.

    Selective-DPO (arXiv 2507.07725), as its authors run it: a score at the quantile is kept, and so
    are all that equal it. A response keeps T - ceil(quantile (T - 1)) tokens, and more where scores
    are equal: all of them where the policy still is its reference. What lies between two scores is
    interpolated there; here the upper one of them is the threshold, which keeps the same tokens
    without the rounding of an interpolation.
    """
    if len(score) == 0:
        return torch.empty_like(score, dtype=torch.bool)
    segment = segment_of(cu_rows, len(score))
    by_score = score.argsort(stable=True)
    ascending = by_score[segment[by_score].argsort(stable=True)]  # by segment, then score
    lengths = cu_rows.diff()
    # 1e-9: 0.7 * 10 may be above 7 in floating point and means 7
    place = (quantile * (lengths.double() - 1) - 1e-9).ceil().clamp(min=0).long()
    # an empty response finds a neighbour's score, and no token asks for it
    at = (cu_rows[:-1] + place).clamp(max=len(score) - 1)
    return ~(score < score[ascending[at]][segment])
