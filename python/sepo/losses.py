"""Preference losses: pure functions of small float32 tensors. Nothing here knows about models.

Every loss maps segment values (S,) to per-pair losses (P,); the caller reduces. Segment 2p is
pair p's chosen response and segment 2p + 1 its rejected one. All log-probabilities in nats.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "dpo_loss",
    "dpop_logratio",
    "dpop_loss",
    "ipo_loss",
    "rrhf_loss",
    "sepo_loss",
    "simpo_loss",
    "sparsepo_loss",
    "tdpo_loss",
]


def sepo_loss(
    mean_logp: Tensor,  # (S,) of each segment's selected tokens
    *,
    gamma: float,  # scale of the difference, per nat
    margin: float = 0.0,  # the paper's lambda, in units of gamma * mean_logp
) -> Tensor:  # (P,)
    """SePO (arXiv 2408.13518) eq. 11: -log sigmoid(gamma * (chosen - rejected) - margin).

    Args:
        mean_logp: (2 P,) floating point, nats: the mean log-probability of each segment's selected
            tokens, chosen and rejected in turn.
        gamma: scale of the difference, per nat.
        margin: the paper's lambda, in units of gamma * mean_logp.

    Returns:
        Tensor: (P,) losses, in the dtype of mean_logp.

    Raises:
        ValueError: for a mean_logp that is not (2 P,).
    """
    return -F.logsigmoid(gamma * _chosen_minus_rejected(mean_logp) - margin)


def simpo_loss(
    mean_logp: Tensor,  # (S,) of each response
    *,
    beta: float,  # scale of the difference, per nat
    margin: float,  # SimPO's gamma = beta * gamma_beta_ratio, in units of beta * mean_logp
) -> Tensor:  # (P,)
    """SimPO (arXiv 2405.14734) eq. 6: -log sigmoid(beta * (chosen - rejected) - margin).

    Args:
        mean_logp: (2 P,) floating point, nats: the mean log-probability of each response's tokens,
            chosen and rejected in turn.
        beta: scale of the difference, per nat.
        margin: SimPO's gamma = beta * gamma_beta_ratio, in units of beta * mean_logp.

    Returns:
        Tensor: (P,) losses, in the dtype of mean_logp.

    Raises:
        ValueError: for a mean_logp that is not (2 P,).
    """
    return -F.logsigmoid(beta * _chosen_minus_rejected(mean_logp) - margin)


def dpo_loss(
    logratio: Tensor,  # (S,) sum over each response of logp - ref_logp
    *,
    beta: float,  # per nat
    label_smoothing: float = 0.0,  # probability that the label is wrong; above 0 it is cDPO
) -> Tensor:  # (P,)
    """DPO (arXiv 2305.18290) eq. 7, with h = chosen - rejected and e = label_smoothing:

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    Args:
        logratio: (2 P,) floating point, nats: the sum over each response of logp - ref_logp, chosen
            and rejected in turn.
        beta: scale of the difference, per nat.
        label_smoothing: probability that a pair's label is wrong, in [0, 0.5); above 0 the loss is
            conservative DPO.

    Returns:
        Tensor: (P,) losses, in the dtype of logratio.

    Raises:
        ValueError: for a logratio that is not (2 P,).
    """
    h = beta * _chosen_minus_rejected(logratio)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def ipo_loss(
    logratio: Tensor,  # (S,) mean over each response of logp - ref_logp; sum, as first published
    *,
    beta: float,  # the paper's tau, per nat
) -> Tensor:  # (P,)
    """IPO (arXiv 2310.12036) eq. 17: (h - 1 / (2 beta))^2, h = chosen - rejected.

    Args:
        logratio: (2 P,) floating point, nats: the mean over each response of logp - ref_logp,
            chosen and rejected in turn. Means are what the authors confirmed; sums, as first
            published, make the target depend on the responses' lengths.
        beta: the paper's tau, per nat.

    Returns:
        Tensor: (P,) losses, in the dtype of logratio.

    Raises:
        ValueError: for a logratio that is not (2 P,).
    """
    return (_chosen_minus_rejected(logratio) - 1 / (2 * beta)).square()


def rrhf_loss(
    mean_logp: Tensor,  # (S,) of each response, over its own length
    chosen_nll: Tensor,  # (P,) -sum (the paper) or -mean of the chosen response's logp
    *,
    sft_weight: float = 1.0,
) -> Tensor:  # (P,)
    """RRHF (arXiv 2304.05302) eq. 3-5, two responses: max(0, rejected - chosen) + w chosen_nll.

    Args:
        mean_logp: (2 P,) floating point, nats: the mean log-probability of each response over its
            own length, chosen and rejected in turn.
        chosen_nll: (P,) floating point, nats: minus the sum (the paper) or the mean of the chosen
            response's log-probabilities.
        sft_weight: w, the weight of chosen_nll.

    Returns:
        Tensor: (P,) losses, in the dtype of mean_logp.

    Raises:
        ValueError: for a mean_logp that is not (2 P,), or a chosen_nll that is not (P,).
    """
    ranking = F.relu(-_chosen_minus_rejected(mean_logp))
    if chosen_nll.shape != ranking.shape:
        raise ValueError(
            f"expected one chosen_nll a pair, ({len(ranking)},), got {tuple(chosen_nll.shape)}"
        )
    return ranking + sft_weight * chosen_nll


def dpop_loss(
    logratio: Tensor,  # (S,) sum over each response of logp - ref_logp
    *,
    beta: float,  # per nat
    penalty: float,  # the paper's lambda, on a chosen response below its reference
) -> Tensor:  # (P,)
    """DPO-Positive (arXiv 2402.13228) eq. 3: -log sigmoid(beta (h - lambda max(0, -chosen))).

    h = chosen - rejected; the penalty is inside beta.

    Args:
        logratio: (2 P,) floating point, nats: the sum over each response of logp - ref_logp, chosen
            and rejected in turn.
        beta: scale of the difference, per nat.
        penalty: the paper's lambda, on a chosen response that is less likely than under the
            reference.

    Returns:
        Tensor: (P,) losses, in the dtype of logratio.

    Raises:
        ValueError: for a logratio that is not (2 P,).
    """
    return -F.logsigmoid(beta * _chosen_minus_rejected(dpop_logratio(logratio, penalty)))


def dpop_logratio(
    logratio: Tensor,  # (S,) sum over each response of logp - ref_logp
    penalty: float,
) -> Tensor:  # (S,)
    """Return what DPO-Positive (arXiv 2402.13228) compares; its reward divided by beta.

    A chosen response below its reference counts 1 + penalty times.

    Args:
        logratio: (2 P,) floating point, nats: the sum over each response of logp - ref_logp, chosen
            and rejected in turn.
        penalty: the paper's lambda.

    Returns:
        Tensor: (2 P,) nats, in the dtype of logratio.

    Raises:
        ValueError: for a logratio that is not (2 P,).
    """
    chosen, rejected = _pairs(logratio)
    return torch.stack([chosen - penalty * F.relu(-chosen), rejected], 1).flatten()


def tdpo_loss(
    logratio: Tensor,  # (S,) sum over each response of logp - ref_logp
    kl: Tensor,  # (S,) sum over each response of KL(ref || policy)
    *,
    beta: float,  # per nat
    variant: Literal[1, 2],
    alpha: float = 0.5,  # weight of the KL, variant 2
) -> Tensor:  # (P,)
    """TDPO (arXiv 2404.11999), with h = chosen - rejected of logratio, F = kl:

    variant 1, eq. 16: -log sigmoid(beta (h - (F_rejected - F_chosen)));
    variant 2, eq. 17: -log sigmoid(beta (h - alpha (F_rejected - stop_gradient(F_chosen)))).

    Args:
        logratio: (2 P,) floating point, nats: the sum over each response of logp - ref_logp, chosen
            and rejected in turn.
        kl: (2 P,) floating point, nats: the sum over each response of KL(ref || policy), token by
            token.
        beta: scale of the difference, per nat.
        variant: 1 or 2.
        alpha: weight of the KL in variant 2; variant 1 has none.

    Returns:
        Tensor: (P,) losses, in the dtype of logratio.

    Raises:
        ValueError: for values that are not (2 P,), or another variant.
    """
    if variant not in (1, 2):
        raise ValueError(f"expected variant 1 or 2, got {variant}")
    if variant == 2:
        chosen, rejected = _pairs(kl)
        kl = alpha * torch.stack([chosen.detach(), rejected], 1).flatten()
    return -F.logsigmoid(beta * _chosen_minus_rejected(logratio + kl))


def sparsepo_loss(
    logratio: Tensor,  # (S,) sum over each response of m_u (logp - ref_logp)
    kl: Tensor,  # (S,) sum over each response of m_d KL: of ref || policy for "released"
    *,
    beta: float,  # per nat
    form: Literal["paper", "released"] = "released",
) -> Tensor:  # (P,)
    """SparsePO (arXiv 2410.05102), with u and d = chosen - rejected of logratio and kl:

    "released", what its authors ran: -log sigmoid(beta (u + d)); with masks of 1 it is TDPO1;
    "paper", eq. 6-8, with KL(policy || ref): -log sigmoid(beta (u - d)).

    The L1 norms of the masks are added by the caller.

    Args:
        logratio: (2 P,) floating point, nats: the sum over each response of
            m_u (logp - ref_logp), chosen and rejected in turn.
        kl: (2 P,) floating point, nats: the sum over each response of m_d KL, of ref || policy for
            "code", of policy || ref for "paper".
        beta: scale of the difference, per nat.
        form: "code" or "paper".

    Returns:
        Tensor: (P,) losses, in the dtype of logratio.

    Raises:
        ValueError: for values that are not (2 P,), or another form.
    """
    return -F.logsigmoid(beta * _chosen_minus_rejected(logratio + _sign(form) * kl))


def _sign(form: str) -> int:
    """Of the KL in SparsePO's margin: paper and code disagree."""
    if form not in ("paper", "released", "code"):  # code: what released was called
        raise ValueError(f'expected form "paper" or "released", got "{form}"')
    return -1 if form == "paper" else 1


def _chosen_minus_rejected(values: Tensor) -> Tensor:  # (S,) -> (P,)
    chosen, rejected = _pairs(values)
    return chosen - rejected


def _pairs(values: Tensor) -> tuple[Tensor, Tensor]:  # (S,) -> (P,), (P,)
    if values.ndim != 1 or values.shape[0] % 2:
        raise ValueError(f"expected one value a segment, (2 P,), got {tuple(values.shape)}")
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected
