"""The losses against golden numbers of the original implementations, and their identities."""

import json
import math
from pathlib import Path

import pytest
import torch

from sepo.losses import dpo_loss, sepo_loss, simpo_loss
from sepo.ops import segment_mean, segment_sum, selected_logprob

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "fixture_g.json").read_text())
V, PROMPT = 5, 2
IDS = [[0, 1, 2, 3, 4, 1], [0, 1, 3, 3, 2]]
SELECTED = [[0, 3], [0]]  # SePO at k = 0.5
ALL = [[0, 1, 2, 3], [0, 1, 2]]


def logits(b: int, *, policy: bool) -> torch.Tensor:  # (T, V) float64
    t = torch.arange(len(IDS[b]), dtype=torch.float64)[:, None]
    v = torch.arange(V, dtype=torch.float64)
    if policy:
        return 2 * torch.sin(0.7 * b + 0.9 * t + 1.3 * v)
    return 2 * torch.cos(0.5 * b + 0.6 * t + 1.1 * v)


def plain_logp(both, positions):
    """logp of the given response positions through log_softmax, and their offsets."""
    found = []
    for b, z in enumerate(both):
        logp = z[:-1].log_softmax(-1).gather(-1, torch.tensor(IDS[b])[1:, None])[:, 0]
        found.append(logp[torch.tensor(positions[b]) + PROMPT - 1])
    return torch.cat(found), offsets(positions)


def fused_logp(both, positions):
    """The same through the fused head: the logits are the hidden states of an identity head."""
    rows, targets = [], []
    for b, at in enumerate(positions):
        rows += [b * len(IDS[0]) + PROMPT + t - 1 for t in at]
        targets += [IDS[b][PROMPT + t] for t in at]
    head = torch.eye(V, dtype=torch.float64)
    logp = selected_logprob(
        torch.cat(both), head, torch.tensor(rows, dtype=torch.int32), torch.tensor(targets)
    )
    return logp, offsets(positions)


def offsets(positions):
    return torch.tensor([0, *(len(at) for at in positions)]).cumsum(0).int()


def logratio(read, both):
    logp, cu = read(both, ALL)
    reference, _ = read([logits(b, policy=False) for b in (0, 1)], ALL)
    return segment_sum(logp - reference, cu)


def mean(read, both, positions=ALL):
    return segment_mean(*read(both, positions))


CASES = {
    "dpo_beta0.1": lambda f, z: dpo_loss(logratio(f, z), beta=0.1),
    "cdpo_beta0.1_ls0.1": lambda f, z: dpo_loss(logratio(f, z), beta=0.1, label_smoothing=0.1),
    "simpo_beta2.0_ratio0.5": lambda f, z: simpo_loss(mean(f, z), beta=2.0, margin=1.0),
    "simpo_beta2.5_ratio0.55": lambda f, z: simpo_loss(mean(f, z), beta=2.5, margin=2.5 * 0.55),
    "sepo_k0.5_gamma1_lambda0": lambda f, z: sepo_loss(mean(f, z, SELECTED), gamma=1.0),
    "sepo_k0.5_gamma2_lambda0.5": lambda f, z: sepo_loss(
        mean(f, z, SELECTED), gamma=2.0, margin=0.5
    ),
}


@pytest.mark.parametrize("read", [plain_logp, fused_logp])
@pytest.mark.parametrize("case", CASES)
def test_golden_value_and_gradients(case, read):
    both = [logits(b, policy=True).requires_grad_() for b in (0, 1)]
    loss = CASES[case](read, both)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(GOLDEN["loss"][case], abs=1e-10, rel=0)
    chosen, rejected = torch.autograd.grad(loss.sum(), both)
    expected = GOLDEN["grad_wrt_policy_logits"][case]
    assert (chosen.abs().sum() + rejected.abs().sum()).item() == pytest.approx(
        expected["l1"], abs=1e-10, rel=0
    )
    # row 1 is the last of the prompt: it predicts the first response token
    assert chosen[1].tolist() == pytest.approx(expected["chosen_t1"], abs=1e-10, rel=0)
    assert rejected[1].tolist() == pytest.approx(expected["rejected_t1"], abs=1e-10, rel=0)


@pytest.mark.parametrize("read", [plain_logp, fused_logp])
def test_golden_token_logp(read):
    logp, _ = read([logits(b, policy=True) for b in (0, 1)], ALL)
    expected = GOLDEN["policy_token_logp"][0] + GOLDEN["policy_token_logp"][1]
    assert logp.tolist() == pytest.approx(expected, abs=1e-12, rel=0)


def values_and_gradients(loss, x):
    x = x.clone().requires_grad_()
    out = loss(x)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


@pytest.fixture
def score():
    return torch.randn(14, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


def test_sepo_with_every_token_is_simpo(score):
    sepo = values_and_gradients(lambda s: sepo_loss(s, gamma=2.3, margin=0.4), score)
    simpo = values_and_gradients(lambda s: simpo_loss(s, beta=2.3, margin=0.4), score)
    assert all(torch.equal(a, b) for a, b in zip(sepo, simpo, strict=True))


def test_policy_equal_to_reference_gives_ln_2():
    for smoothing in (0.0, 0.2):
        loss = dpo_loss(torch.zeros(6).double(), beta=0.1, label_smoothing=smoothing)
        assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)


def test_swapping_the_pair_negates_the_logit_of_dpo(score):
    swapped = score.view(-1, 2).flip(1).reshape(-1)
    logit = lambda loss: -torch.log(torch.expm1(loss))  # of -log sigmoid(logit)
    torch.testing.assert_close(
        logit(dpo_loss(score, beta=0.3)), -logit(dpo_loss(swapped, beta=0.3))
    )
    # a wrong label with certainty is the swapped pair
    torch.testing.assert_close(
        dpo_loss(score, beta=0.3, label_smoothing=1.0), dpo_loss(swapped, beta=0.3)
    )


def test_pairs_do_not_see_each_other(score):
    for fn in (
        lambda s: sepo_loss(s, gamma=2.0, margin=0.5),
        lambda s: simpo_loss(s, beta=2.0, margin=0.5),
        lambda s: dpo_loss(s, beta=0.1, label_smoothing=0.1),
    ):
        alone = torch.cat([fn(score[i : i + 2]) for i in range(0, 14, 2)])
        # vectorised and scalar logarithms differ in the last bit
        torch.testing.assert_close(fn(score), alone, rtol=1e-15, atol=1e-15)
        assert torch.autograd.gradcheck(fn, (score.clone().requires_grad_(),))
        assert fn(score[:0]).shape == (0,)


def test_extreme_scores_stay_finite():
    far = torch.tensor([-1e4, 1e4, 1e4, -1e4])
    loss, grad = values_and_gradients(lambda s: sepo_loss(s, gamma=2.0), far)
    assert loss.tolist() == [4e4, 0.0] and grad.tolist() == [-2.0, 2.0, 0.0, 0.0]
    loss, grad = values_and_gradients(lambda s: dpo_loss(s, beta=1.0, label_smoothing=0.1), far)
    assert loss.tolist() == pytest.approx([1.8e4, 2e3]) and grad.isfinite().all()


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 2)], ids=["odd", "rank"])
def test_refuses_what_is_not_pairs(wrong):
    for fn in (
        lambda s: sepo_loss(s, gamma=1.0),
        lambda s: simpo_loss(s, beta=1.0, margin=0.0),
        lambda s: dpo_loss(s, beta=1.0),
    ):
        with pytest.raises(ValueError, match=r"one value a segment, \(2 P,\), got \((3,|2, 2)\)"):
            fn(wrong)
