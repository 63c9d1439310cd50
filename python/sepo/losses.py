"""Preference losses: pure functions of small float32 tensors. Nothing here knows about models.

Every loss maps segment values (S,) to per-pair losses (P,); the caller reduces. Segment 2p is
pair p's chosen response and segment 2p + 1 its rejected one. All log-probabilities in nats.
"""

import torch.nn.functional as F
from torch import Tensor


def sepo_loss(
    score: Tensor,  # (S,) mean logp of each segment's selected tokens
    *,
    gamma: float,  # scale of the score difference, per nat
    margin: float = 0.0,  # the paper's lambda, in units of gamma * score
) -> Tensor:  # (P,)
    """SePO (arXiv 2408.13518) eq. 11: -log sigmoid(gamma * (chosen - rejected) - margin).

    Raises ValueError for a score that is not (2 P,).
    """
    return -F.logsigmoid(gamma * _chosen_minus_rejected(score) - margin)


def simpo_loss(
    score: Tensor,  # (S,) mean logp of each response
    *,
    beta: float,  # scale of the score difference, per nat
    margin: float,  # SimPO's gamma = beta * gamma_beta_ratio, in units of beta * score
) -> Tensor:  # (P,)
    """SimPO (arXiv 2405.14734) eq. 6: -log sigmoid(beta * (chosen - rejected) - margin).

    Raises ValueError for a score that is not (2 P,).
    """
    return -F.logsigmoid(beta * _chosen_minus_rejected(score) - margin)


def dpo_loss(
    logratio: Tensor,  # (S,) sum over each response of logp - ref_logp
    *,
    beta: float,  # per nat
    label_smoothing: float = 0.0,  # probability that the label is wrong; above 0 it is cDPO
) -> Tensor:  # (P,)
    """DPO (arXiv 2305.18290) eq. 7, with h = chosen - rejected and e = label_smoothing:

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    Raises ValueError for a logratio that is not (2 P,).
    """
    h = beta * _chosen_minus_rejected(logratio)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def _chosen_minus_rejected(values: Tensor) -> Tensor:  # (S,) -> (P,)
    if values.ndim != 1 or values.shape[0] % 2:
        raise ValueError(f"expected one value a segment, (2 P,), got {tuple(values.shape)}")
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen - rejected
