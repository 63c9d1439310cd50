"""Policy gradients on the most open fifth of the tokens: the same as by a mask, in 1.6 GEMMs."""

import pytest
import torch
from ops.stats_cases import make_inputs
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import high_entropy_rows, selected_logprob, selected_stats
from sepo_kernels.selected_logprob import reference

N, M, D, V = 64, 100, 24, 301


def by_order(entropy, fraction, cu_rows):
    """The first K of each segment, the earlier of equal ones first: rows repeat."""
    found = []
    for start, stop in zip(cu_rows[:-1], cu_rows[1:], strict=True):
        K = max(1, int(fraction * (stop - start) + 1e-9))
        order = sorted(range(start, stop), key=lambda i: (-entropy[i].item(), i))
        found += sorted(order[:K])
    return found


@pytest.mark.parametrize("cu_rows", [None, [0, 10, 11, 60, 100]], ids=["batch", "segments"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_keeps_the_highest_entropies(fraction, cu_rows):
    hidden, weight, bias, rows, targets, _ = make_inputs(N, M, D, V, bias=True)
    scale = torch.logspace(-0.3, 0.3, M)
    options = dict(bias=bias, scale=scale, softcap=8.0)
    offsets = None if cu_rows is None else torch.tensor(cu_rows)
    kept = high_entropy_rows(
        hidden, weight, rows, targets, fraction=fraction, cu_rows=offsets, **options
    )
    z = reference.capped_logits(
        hidden.double(), weight.double(), rows, bias.double(), scale.double(), 8.0
    )
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert kept.indices.tolist() == by_order(entropy, fraction, cu_rows or [0, M])
    assert kept.cu_rows.shape == (2 if cu_rows is None else len(cu_rows),)
    expected = selected_stats(hidden, weight, rows, targets, **options)
    assert all(map(torch.equal, kept.stats, expected))


def policy_loss(logp, old, advantage):
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def test_the_policy_gradient_in_1_6_gemms_is_that_of_a_mask():
    """The docstring's three calls, counted, against all rows with a mask in float64."""
    hidden, weight, _, rows, targets, advantage = make_inputs(N, M, D, V, dtype=torch.float64)
    old = torch.full((M,), -5.0).double()
    advantage = advantage.double()
    hidden.requires_grad_(), weight.requires_grad_()
    with FlopCounterMode(display=False) as count:
        kept = high_entropy_rows(hidden, weight, rows, targets)
        i = kept.indices.long()
        logp = selected_logprob(hidden, weight, rows[i], targets[i])
        policy_loss(logp, old[i], advantage[i]).sum().backward()
    assert count.get_total_flops() == (M + 3 * M // 5) * 2 * D * V
    assert len(i) == M // 5 and not kept.stats.entropy.requires_grad

    whole = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    logp = reference.selected_logprob(*whole, rows, targets)
    mask = torch.zeros(M).double()
    mask[by_order(kept.stats.entropy, 0.2, [0, M])] = 1
    (policy_loss(logp, old, advantage) * mask).sum().backward()
    for x, exact in zip((hidden, weight), whole, strict=True):
        torch.testing.assert_close(x.grad, exact.grad, rtol=1e-10, atol=1e-12)


def test_no_rows():
    hidden, weight, _, rows, targets, _ = make_inputs(8, 0, D, V)
    kept = high_entropy_rows(hidden, weight, rows, targets)
    assert kept.indices.shape == (0,) and kept.cu_rows.tolist() == [0, 0]


def test_refuses_by_name():
    hidden, weight, _, rows, targets, _ = make_inputs(8, 4, D, V)
    with pytest.raises(ValueError, match="0 < fraction <= 1, got 0"):
        high_entropy_rows(hidden, weight, rows, targets, fraction=0)
    with pytest.raises(ValueError, match="int32 or int64 rows"):
        high_entropy_rows(hidden, weight, rows.float(), targets)
    with pytest.raises(ValueError, match="cu_tokens"):
        high_entropy_rows(hidden, weight, rows, targets, cu_rows=torch.tensor([0, 3]))
