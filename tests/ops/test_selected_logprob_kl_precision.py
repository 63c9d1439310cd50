"""bfloat16 inputs, where it is hard: confident and unlikely rows, heads that are nearly equal."""

import pytest
import torch
from numerics import max_error
from ops import implementations
from ops.kl_cases import DIRECTIONS, budget_for, checked, make_inputs, run

from sepo.ops import selected_logprob_kl
from sepo_kernels.selected_logprob_kl import IMPLS, reference

M, D, D_REF, V = 96, 64, 48, 5003


impl = implementations.fixture(IMPLS)


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def situation(name: str):
    """bfloat16 inputs whose row m is read once, for target m."""
    i = make_inputs(M, M, D, D_REF, V, dtype=torch.bfloat16, seed=3)
    i = i._replace(rows=torch.arange(M, dtype=torch.int32))
    if name == "confident":  # every other row is made from its target's, in both heads
        likely = lambda hidden, weight: torch.where(
            torch.arange(M)[:, None] % 2 == 0, weight[i.targets] * 4, hidden
        )
        return i._replace(
            hidden=likely(i.hidden, i.weight), ref_hidden=likely(i.ref_hidden, i.ref_weight)
        )
    if name == "unlikely":
        return i._replace(targets=(i.hidden.double() @ i.weight.double().T).argmin(-1))
    assert name == "nearly equal"
    noise = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    near = (i.weight.float() * (1 + 0.004 * noise)).bfloat16()
    return i._replace(ref_hidden=i.hidden, ref_weight=near)


SITUATIONS = ["confident", "unlikely", "nearly equal"]


@pytest.mark.parametrize("name", SITUATIONS)
def test_numbers_within_1e_4_nats(impl, direction, name):
    i = situation(name)
    truth = i.to(torch.float64).call(reference.selected_logprob_kl, direction=direction)
    if name == "confident":
        assert (truth[0][::2] > -1e-4).any() and truth[2].max() > 1
    elif name == "unlikely":
        assert truth[0].max() < -12
    else:
        assert 1e-6 < truth[2].mean() < 1e-3
    ours = i.call(selected_logprob_kl, direction=direction, impl=impl)
    for a, b in zip(ours, truth, strict=True):
        assert max_error(a, b) < 1e-4
    if name == "nearly equal":  # a kl of 1e-4 nats is still a number, not rounding
        assert max_error(ours[2], truth[2]) < 1e-2 * truth[2].mean()


def of_gradient_rounded_once(i, direction):
    """Products as ours, of a dZ made in float64 and rounded to bfloat16 once."""
    a, b = (h.double() @ w.double().T for h, w in ((i.hidden, i.weight), i[3:5]))
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    p, ratio = log_p.exp(), log_q - log_p
    if direction == "ref||policy":
        of_kl = p - log_q.exp()
    else:
        of_kl = -p * (ratio - (p * ratio).sum(-1, keepdim=True))
    onehot = torch.nn.functional.one_hot(i.targets, V)
    grad_logp, grad_kl = i.upstream.double()[:, :, None]
    dz = (grad_kl * of_kl - grad_logp * (p - onehot)).bfloat16()
    return {"hidden": dz @ i.weight, "weight": dz.T @ i.hidden}


@pytest.mark.parametrize("used", ["logp", "kl", "both"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_gradients_nearly_as_good_as_of_one_rounding(impl, direction, name, used):
    """At most 1.5 times the error of one rounding: a kept block is rounded, then dZ once more.

    Native keeps one block that goes into both gradients: save up to 1.43, frozen_head 1.52,
    recompute 1.63.
    Measured with chunked: save 1.00 to 1.21, frozen_head 0.88 to 1.33; recompute, where each of
    four chunks of rows rounds its product, 1.00 to 1.44.
    """
    i = situation(name)
    for row, output in enumerate(("logp", "kl")):
        i.upstream[row] *= used in (output, "both")
    truth = run(reference.selected_logprob_kl, i, dtype=torch.float64, direction=direction)
    once = of_gradient_rounded_once(i, direction)
    error = lambda x, name: (x[name].double() - truth[name]).norm()
    budget = 5 * budget_for("recompute", V, torch.bfloat16)
    for schedule in ("save", "recompute", "frozen_head"):
        ours = run(
            checked(schedule, M), i, schedule=schedule, direction=direction, impl=impl,
            budget=None if schedule == "save" else budget,
        )  # fmt: skip
        for leaf in once.keys() & ours.keys():
            ratio = error(ours, leaf) / error(once, leaf)
            limit = 1.7 if impl == "native" and schedule != "save" else 1.5
            assert ratio <= limit, (schedule, leaf, ratio)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_extreme_logits_stay_finite(impl, direction, dtype):
    """Logits of 1e4 and -1e4 on opposite sides: probabilities that underflow, ratios of e^20000."""
    hidden = torch.eye(2).to(dtype)
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.5]]).to(dtype) * 10000
    rows, targets = torch.tensor([0, 0, 1], dtype=torch.int32), torch.tensor([0, 1, 2])
    i = make_inputs(2, 3, 2, 2, 3, dtype=dtype)
    i = i._replace(hidden=hidden, weight=weight, ref_hidden=hidden.flip(0), ref_weight=weight)
    i = i._replace(rows=rows, targets=targets)
    truth = run(reference.selected_logprob_kl, i, dtype=torch.float64, direction=direction)
    ours = run(selected_logprob_kl, i, direction=direction, impl=impl)
    for name, value in truth.items():
        eps = torch.finfo(ours[name].dtype).eps
        torch.testing.assert_close(ours[name].double(), value, rtol=4 * eps, atol=4 * eps)


def test_divergence_gradient_is_not_rounding_near_the_reference(impl):
    """log q - log p of 1e-5 where log p is about -9: float32 probabilities do not tell them apart."""
    V = 8192
    i = make_inputs(1, 1, 1, 1, V, bias=True)
    noise = 1e-5 * torch.randn(V, generator=torch.Generator().manual_seed(1))
    i = i._replace(
        hidden=torch.zeros(1, 1), ref_hidden=torch.zeros(1, 1),
        bias=(i.bias + noise).requires_grad_(), ref_bias=i.bias,
        rows=torch.zeros(1, dtype=torch.int32), targets=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    kl = i.call(selected_logprob_kl, direction="ref||policy", impl=impl)[2]
    (grad,) = torch.autograd.grad(kl, i.bias)
    exact = i.bias.detach().double().softmax(-1) - i.ref_bias.double().softmax(-1)
    # measured 0.003; of a difference of the two probabilities 0.03
    assert (grad - exact).norm() / exact.norm() < 0.01
