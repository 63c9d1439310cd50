"""The golden numbers of the original implementations, and each loss as they computed it."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sepo.losses import (
    dpo_loss,
    dpop_loss,
    ipo_loss,
    rrhf_loss,
    sepo_loss,
    simpo_loss,
    sparsepo_loss,
    tdpo_loss,
)
from sepo.masks import AboveQuantile, below_mean_probability
from sepo.ops import segment_mean, segment_sum, selected_logprob, selected_logprob_kl

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "fixture_g.json").read_text())
V, PROMPT = 5, 2
IDS = [[0, 1, 2, 3, 4, 1], [0, 1, 3, 3, 2]]
SELECTED = [[0, 3], [0]]  # SePO at k = 0.5
ALL = [[0, 1, 2, 3], [0, 1, 2]]
F64 = dict(dtype=torch.float64)
REWARD_MASK = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.6, 0.5, 0.4], **F64)  # chosen, then rejected
KL_MASK = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.2, 0.35, 0.5], **F64)
ONES = torch.ones(7, **F64)
FORWARD, REVERSE = "ref||policy", "policy||ref"


def logits(b: int, *, policy: bool) -> Tensor:  # (T, V) float64
    t = torch.arange(len(IDS[b]), **F64)[:, None]
    v = torch.arange(V, **F64)
    if policy:
        return 2 * torch.sin(0.7 * b + 0.9 * t + 1.3 * v)
    return 2 * torch.cos(0.5 * b + 0.6 * t + 1.1 * v)


class Tokens(NamedTuple):
    """What is read of the response tokens, those of the chosen response first."""

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor | None  # None: no direction was asked for
    cu_rows: Tensor


def plain(both, positions=ALL, *, direction=None) -> Tokens:
    """Through log_softmax of all logits of both models."""
    found = []
    for b, z in enumerate(both):
        at = torch.tensor(positions[b]) + PROMPT
        p, q = (x[at - 1].log_softmax(-1) for x in (z, logits(b, policy=False)))
        kl = (p.exp() * (p - q) if direction == REVERSE else q.exp() * (q - p)).sum(-1)
        targets = torch.tensor(IDS[b])[at, None]
        found.append((p.gather(-1, targets)[:, 0], q.gather(-1, targets)[:, 0], kl))
    logp, ref_logp, kl = map(torch.cat, zip(*found, strict=True))
    return Tokens(logp, ref_logp, None if direction is None else kl, offsets(positions))


def fused(both, positions=ALL, *, direction=None) -> Tokens:
    """Through the fused heads: the logits are the hidden states of an identity head."""
    rows, targets = [], []
    for b, at in enumerate(positions):
        rows += [b * len(IDS[0]) + PROMPT + t - 1 for t in at]
        targets += [IDS[b][PROMPT + t] for t in at]
    where = torch.tensor(rows, dtype=torch.int32), torch.tensor(targets)
    head = torch.eye(V, **F64)
    policy, reference = torch.cat(both), torch.cat([logits(b, policy=False) for b in (0, 1)])
    if direction is None:
        values = *(selected_logprob(z, head, *where) for z in (policy, reference)), None
    else:
        values = selected_logprob_kl(policy, head, reference, head, *where, direction=direction)
    return Tokens(*values, offsets(positions))


def offsets(positions) -> Tensor:
    return torch.tensor([0, *map(len, positions)]).cumsum(0).int()


def ratio(read, z, reduce=segment_sum, mask=ONES):
    tokens = read(z)
    return reduce(mask * (tokens.logp - tokens.ref_logp), tokens.cu_rows)


def kl(read, z, direction=FORWARD, mask=ONES):
    tokens = read(z, direction=direction)
    return segment_sum(mask * tokens.kl, tokens.cu_rows)


def mean(read, z, positions=ALL):
    tokens = read(z, positions)
    return segment_mean(tokens.logp, tokens.cu_rows)


def kept_mean(read, z, keep):
    """Of the tokens that a rule keeps: sums of one and of the other, divided."""
    tokens = read(z)
    kept = keep(tokens).double()
    return segment_sum(kept * tokens.logp, tokens.cu_rows) / segment_sum(kept, tokens.cu_rows)


def confident(read, z, **options):
    below = lambda tokens: below_mean_probability(tokens.logp.detach(), tokens.cu_rows)
    return simpo_loss(kept_mean(read, z, below), **options)


def selective(read, z, quantile):
    tokens = read(z)
    keep = AboveQuantile(quantile).keep(tokens.logp.detach(), tokens.ref_logp, None, tokens.cu_rows)
    return dpo_loss(ratio(read, z, mask=keep.double()), beta=0.1)


def rrhf(read, z, *, swapped=False, reduce=segment_sum, **options):
    tokens = read(z)
    means, totals = (f(tokens.logp, tokens.cu_rows) for f in (segment_mean, reduce))
    if swapped:
        means, totals = means.flip(0), totals.flip(0)
    return rrhf_loss(means, -totals[0::2], **options)


def tdpo(read, z, **options):
    return tdpo_loss(ratio(read, z), kl(read, z), beta=0.1, **options)


def sparsepo(read, z, *, form, masks, l1=0.0):
    """Through reward and KL of both models at once, as the trainer reads them."""
    tokens = read(z, direction=FORWARD if form == "released" else REVERSE)
    reward_mask, kl_mask = masks
    u = segment_sum(reward_mask * (tokens.logp - tokens.ref_logp), tokens.cu_rows)
    d = segment_sum(kl_mask * tokens.kl, tokens.cu_rows)
    norms = reward_mask.sum() + kl_mask.sum()
    return sparsepo_loss(u, d, beta=0.1, form=form) + l1 * norms


COMMON, INDEPENDENT = (REWARD_MASK, REWARD_MASK), (REWARD_MASK, KL_MASK)
CASES = {
    "dpo_beta0.1": lambda f, z: dpo_loss(ratio(f, z), beta=0.1),
    "cdpo_beta0.1_ls0.1": lambda f, z: dpo_loss(ratio(f, z), beta=0.1, label_smoothing=0.1),
    "ipo_sum_tau0.1": lambda f, z: ipo_loss(ratio(f, z), beta=0.1),
    "ipo_mean_tau0.1": lambda f, z: ipo_loss(ratio(f, z, segment_mean), beta=0.1),
    "simpo_beta2.0_ratio0.5": lambda f, z: simpo_loss(mean(f, z), beta=2.0, margin=1.0),
    "simpo_beta2.5_ratio0.55": lambda f, z: simpo_loss(mean(f, z), beta=2.5, margin=2.5 * 0.55),
    "tdpo1_beta0.1": lambda f, z: tdpo(f, z, variant=1),
    "tdpo2_beta0.1_alpha0.5": lambda f, z: tdpo(f, z, variant=2, alpha=0.5),
    "dpop_beta0.1_lambda50": lambda f, z: dpop_loss(ratio(f, z), beta=0.1, penalty=50.0),
    "dpop_beta0.3_lambda5": lambda f, z: dpop_loss(ratio(f, z), beta=0.3, penalty=5.0),
    "rrhf_rank_correct": lambda f, z: rrhf(f, z, sft_weight=0.0),
    "rrhf_rank_correct_swapped_pair": lambda f, z: rrhf(f, z, swapped=True, sft_weight=0.0),
    "rrhf_paper_total_sumNLL": lambda f, z: rrhf(f, z),
    "rrhf_meanNLL_total": lambda f, z: rrhf(f, z, reduce=segment_mean),
    "sparsepo_code_common_beta0.1": lambda f, z: sparsepo(f, z, form="released", masks=COMMON),
    "sparsepo_code_indep_beta0.1": lambda f, z: sparsepo(f, z, form="released", masks=INDEPENDENT),
    "sparsepo_code_indep_beta0.1_l1_0.001": lambda f, z: sparsepo(
        f, z, form="released", masks=INDEPENDENT, l1=0.001
    ),
    "sparsepo_code_ones_beta0.1": lambda f, z: sparsepo(f, z, form="released", masks=(ONES, ONES)),
    "sparsepo_paper_common_beta0.1": lambda f, z: sparsepo(f, z, form="paper", masks=COMMON),
    "sparsepo_paper_indep_beta0.1": lambda f, z: sparsepo(f, z, form="paper", masks=INDEPENDENT),
    "sparsepo_paper_ones_beta0.1": lambda f, z: sparsepo(f, z, form="paper", masks=(ONES, ONES)),
    "sepo_k0.5_gamma1_lambda0": lambda f, z: sepo_loss(mean(f, z, SELECTED), gamma=1.0),
    "sepo_k0.5_gamma2_lambda0.5": lambda f, z: sepo_loss(
        mean(f, z, SELECTED), gamma=2.0, margin=0.5
    ),
    "confpo_beta2.0_ratio0.5": lambda f, z: confident(f, z, beta=2.0, margin=1.0),
    "confpo_beta1.5_gamma1.6": lambda f, z: confident(f, z, beta=1.5, margin=1.6),
    "selective_dpo_beta0.1_q0.6": lambda f, z: selective(f, z, 0.6),
    "selective_dpo_beta0.1_q0.3": lambda f, z: selective(f, z, 0.3),
}


def assert_golden_gradients(case, chosen, rejected):  # (T, V): of the logits of each sequence
    expected = GOLDEN["grad_wrt_policy_logits"][case]
    total = chosen.abs().sum() + rejected.abs().sum()
    assert total.item() == pytest.approx(expected["l1"], abs=1e-10, rel=0)
    # row 1 is the last of the prompt: it predicts the first response token
    assert chosen[1].tolist() == pytest.approx(expected["chosen_t1"], abs=1e-10, rel=0)
    assert rejected[1].tolist() == pytest.approx(expected["rejected_t1"], abs=1e-10, rel=0)
