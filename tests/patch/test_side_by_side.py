"""Calls that docs/migrate.md shows beside each other compute the same."""

import pytest
import torch
from tiny import V

from sepo import ops

P, T, D = 3, 9, 16


def draw(seed=0):
    """States, a head and shifted labels of 2 P sequences that alternate: chosen, rejected."""
    torch.manual_seed(seed)
    states, weight, bias = torch.randn(2 * P, T, D), torch.randn(V, D) / 2, torch.randn(V)
    labels = torch.randint(V, (2 * P, T)).masked_fill(torch.rand(2 * P, T) < 0.4, -100)
    return [x.requires_grad_() for x in (states, weight, bias)], labels


def in_ligers_order(x):
    """All chosen before all rejected."""
    return torch.cat([x[0::2], x[1::2]])


def rows_of(labels):
    """Of labels that are shifted already."""
    rows = (labels != -100).flatten().nonzero()[:, 0]
    cu_rows = torch.nn.functional.pad((labels != -100).sum(1).cumsum(0), (1, 0)).int()
    return rows, labels.flatten()[rows], cu_rows


def assert_same(ours, theirs, tensors):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    found, expected = (torch.autograd.grad(loss, tensors) for loss in (ours, theirs))
    size = max(g.abs().max().item() for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)


@pytest.fixture
def liger():
    return pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is for GPUs")


def test_ligers_dpo(liger):
    tensors, labels = draw()
    (states, weight, bias), (reference, ref_weight, ref_bias) = tensors, draw(1)[0]
    theirs, _ = liger.LigerFusedLinearDPOLoss(beta=0.3, compiled=False)(
        weight, in_ligers_order(states), in_ligers_order(labels), bias,
        in_ligers_order(reference).detach(), ref_weight.detach(), ref_bias.detach(),
    )  # fmt: skip
    rows, targets, cu_rows = rows_of(labels)
    with torch.no_grad():
        kept = ops.selected_logprob(
            reference.flatten(0, 1), ref_weight, rows, targets, bias=ref_bias
        )
    logp = ops.selected_logprob(states.flatten(0, 1), weight, rows, targets, bias=bias)
    ours = ops.dpo_loss(ops.segment_sum(logp - kept, cu_rows), beta=0.3).mean()
    assert_same(ours, theirs, tensors)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_ligers_simpo_and_its_likelihood(liger, alpha):
    tensors, labels = draw()
    states, weight, bias = tensors
    how = dict(beta=2.0, gamma=0.5, compute_nll_loss=alpha > 0, alpha=alpha, compiled=False)
    theirs, _ = liger.LigerFusedLinearSimPOLoss(**how)(
        weight, in_ligers_order(states), in_ligers_order(labels), bias
    )
    rows, targets, cu_rows = rows_of(labels)
    logp = ops.selected_logprob(states.flatten(0, 1), weight, rows, targets, bias=bias)
    chosen = (rows // T) % 2 == 0
    ours = ops.simpo_loss(ops.segment_mean(logp, cu_rows), beta=2.0, margin=0.5).mean()
    assert_same(ours - alpha * logp[chosen].mean(), theirs, tensors)
