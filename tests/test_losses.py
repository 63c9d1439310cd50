"""The losses against golden numbers of the original implementations."""

import pytest
import torch
from golden_losses import (
    CASES,
    F64,
    FORWARD,
    GOLDEN,
    REVERSE,
    assert_golden_gradients,
    fused,
    logits,
    plain,
)

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


def test_no_golden_number_is_left_out():
    assert CASES.keys() == GOLDEN["loss"].keys() == GOLDEN["grad_wrt_policy_logits"].keys()


@pytest.mark.parametrize("read", [plain, fused])
@pytest.mark.parametrize("case", CASES)
def test_golden_value_and_gradients(case, read):
    both = [logits(b, policy=True).requires_grad_() for b in (0, 1)]
    loss = CASES[case](read, both)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(GOLDEN["loss"][case], abs=1e-10, rel=0)
    assert_golden_gradients(case, *torch.autograd.grad(loss.sum(), both))


@pytest.mark.parametrize("read", [plain, fused])
def test_golden_token_values(read):
    close = lambda found, name: (
        found.tolist() == pytest.approx(sum(GOLDEN[name], []), abs=1e-12, rel=0)
    )
    both = [logits(b, policy=True) for b in (0, 1)]
    for direction, name in ((FORWARD, "kl_ref_policy"), (REVERSE, "kl_policy_ref")):
        tokens = read(both, direction=direction)
        assert close(tokens.logp, "policy_token_logp") and close(tokens.ref_logp, "ref_token_logp")
        assert close(tokens.kl, name)
    assert close(tokens.logp - tokens.ref_logp, "token_score")


# Every loss, as a function of one vector of segment values
KL = torch.rand(14, generator=torch.Generator().manual_seed(1), **F64) * 3
LOSSES = {
    "sepo": lambda s: sepo_loss(s, gamma=2.0, margin=0.5),
    "simpo": lambda s: simpo_loss(s, beta=2.0, margin=0.5),
    "dpo": lambda s: dpo_loss(s, beta=0.1, label_smoothing=0.1),
    "ipo": lambda s: ipo_loss(s, beta=0.1),
    "rrhf": lambda s: rrhf_loss(s, -s[0::2], sft_weight=0.5),
    "dpop": lambda s: dpop_loss(s, beta=0.3, penalty=5.0),
    "tdpo1": lambda s: tdpo_loss(s, KL[: len(s)].to(s), beta=0.1, variant=1),
    "tdpo2": lambda s: tdpo_loss(s, KL[: len(s)].to(s), beta=0.1, variant=2),
    "sparsepo": lambda s: sparsepo_loss(s, KL[: len(s)].to(s), beta=0.1),
    "sparsepo paper": lambda s: sparsepo_loss(s, KL[: len(s)].to(s), beta=0.1, form="paper"),
}


@pytest.fixture
def score():
    return torch.randn(14, generator=torch.Generator().manual_seed(0), **F64) * 3


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_do_not_see_each_other(name, score):
    loss = LOSSES[name]
    score = score.requires_grad_()
    assert torch.autograd.gradcheck(loss, (score,))
    assert loss(score[:0]).shape == (0,)
    for p, one in enumerate(loss(score)):
        (grad,) = torch.autograd.grad(one, score, retain_graph=True)
        others = grad.view(-1, 2)[[q for q in range(7) if q != p]]
        assert grad.view(-1, 2)[p].any() and not others.any()


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_stay_finite(name):
    """A margin of 20 000 nats, right and wrong: sigmoid is 0 or 1, its logarithm is not."""
    far = torch.tensor([-1e4, 1e4, 1e4, -1e4], requires_grad=True)
    loss = LOSSES[name](far)
    loss.sum().backward()
    assert loss.isfinite().all() and far.grad.isfinite().all()
    assert loss[0] > 500 and far.grad[:2].abs().min() > 0  # wrong, and there is a way out


def test_far_from_the_boundary_the_losses_are_linear():
    far = torch.tensor([-1e4, 1e4, 1e4, -1e4], requires_grad=True)
    loss = sepo_loss(far, gamma=2.0)
    (grad,) = torch.autograd.grad(loss.sum(), far)
    assert loss.tolist() == [4e4, 0.0] and grad.tolist() == [-2.0, 2.0, 0.0, 0.0]
    smoothed = dpo_loss(far, beta=1.0, label_smoothing=0.1)
    assert smoothed.tolist() == pytest.approx([1.8e4, 2e3])


def test_dpop_logratio_is_what_dpop_compares(score):
    """A chosen response below its reference counts 1 + penalty times; others as they are."""
    expected = [6 * s if i % 2 == 0 and s < 0 else s for i, s in enumerate(score.tolist())]
    assert dpop_logratio(score, 5.0).tolist() == pytest.approx(expected, abs=1e-12)
    assert 0 < sum(a != b for a, b in zip(expected, score.tolist(), strict=True)) < 7


def test_tdpo2_stops_the_gradient_of_the_chosen_divergence_alone(score):
    kl = KL.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tdpo_loss(score, kl, beta=0.1, variant=2).sum(), kl)
    assert not grad[0::2].any() and (grad[1::2] > 0).all()
    (grad,) = torch.autograd.grad(tdpo_loss(score, kl, beta=0.1, variant=1).sum(), kl)
    assert (grad[0::2] < 0).all() and (grad[1::2] > 0).all()


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 2)], ids=["odd", "rank"])
@pytest.mark.parametrize("name", LOSSES)
def test_refuses_what_is_not_pairs(name, wrong):
    with pytest.raises(ValueError, match=r"one value a segment, \(2 P,\), got \((3,|2, 2)\)"):
        LOSSES[name](wrong)


def test_refuses_other_choices():
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match=r"expected one chosen_nll a pair, \(2,\), got \(4,\)"):
        rrhf_loss(zeros, zeros)
    with pytest.raises(ValueError, match="expected variant 1 or 2, got 3"):
        tdpo_loss(zeros, zeros, beta=0.1, variant=3)
    with pytest.raises(ValueError, match='expected form "paper" or "released", got "both"'):
        sparsepo_loss(zeros, zeros, beta=0.1, form="both")
