"""Rows that are flat, certain, far from zero, masked or tied; targets next to impossible."""

import math

import pytest
import torch
from numerics import assert_as_accurate
from ops import implementations
from ops.stats_cases import VALUES, make_inputs, of_logits, run, truth_of

from sepo.ops import selected_stats
from sepo_kernels.selected_stats import IMPLS, reference

DTYPES = [torch.float32, torch.bfloat16]
NUMBERS = [name for name in VALUES if name != "top1"]


impl = implementations.fixture(IMPLS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("away", [-90.0, -512.0, 512.0])
def test_logits_far_from_zero(impl, away, dtype):
    """All below -88, whose exponentials are no float32: a maximum may not begin at zero."""
    hidden, weight, _, rows, targets, up = make_inputs(37, 70, 45, 601, dtype=dtype)
    bias = torch.full((601,), away).to(dtype)
    inputs = (hidden, weight, bias, rows, targets, up)
    options = dict(entropy_grad=True, impl=impl)
    found = run(selected_stats, inputs, dtype=dtype, **options)
    truth = run(reference.selected_stats, inputs, dtype=torch.float64)
    plain = run(reference.selected_stats, inputs, dtype=dtype)
    for name, value in truth.items():
        if name != "top1":
            assert_as_accurate(found[name], plain[name], value, what=name)
    assert torch.equal(found["top1"], truth["top1"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hot", [0, 3, 700], ids=str)
def test_a_row_of_one_word_has_no_entropy_and_no_gradient_of_it(impl, hot, dtype):
    """With the target as that word, and with another, which is next to impossible."""
    z = torch.zeros(2, 701)
    z[:, hot] = 256.0
    targets = torch.tensor([hot, 5])
    found, weight = of_logits(z, targets, dtype, impl=impl)
    assert torch.equal(found.entropy.detach(), torch.zeros(2))
    assert torch.equal(found.log_sum_sq, torch.zeros(2))
    assert found.top1.tolist() == [True, False]
    assert found.logp.tolist() == [0.0, -256.0]
    (grad,) = torch.autograd.grad(found.entropy.sum(), weight)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [31, 512, 1101, 50257])
def test_a_flat_row_has_the_largest_entropy(impl, V, dtype):
    found, weight = of_logits(
        torch.full((3, V), 2.0), torch.tensor([0, 1, V - 1]), dtype, impl=impl
    )
    log_V = torch.full((3,), math.log(V))
    torch.testing.assert_close(found.entropy.detach(), log_V, rtol=3e-7, atol=0)
    torch.testing.assert_close(found.log_sum_sq, -log_V, rtol=3e-7, atol=0)
    torch.testing.assert_close(found.mean_logit, torch.full((3,), 2.0), rtol=3e-7, atol=0)
    assert found.top1.tolist() == [True, False, False]
    (grad,) = torch.autograd.grad(found.entropy.sum(), weight)
    assert grad.abs().max() <= 1e-6 * math.log(V) / V  # p (log p + H), of which nothing is left


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_entropy_of_a_nearly_flat_row_keeps_its_gradient(impl, dtype):
    """Logits of about 1/64: from probabilities in 16 bits, log p + H would be all rounding."""
    hidden, weight, _, rows, targets, up = make_inputs(37, 70, 45, 601)
    inputs = (hidden.to(dtype), (weight / 64).to(dtype), None, rows, targets, torch.zeros(70))
    up = torch.randn(70, generator=torch.Generator().manual_seed(5))

    def gradients(fn, dtype, **options):
        hidden, weight, _, rows, targets, _ = inputs
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        entropy = fn(*leaves, rows, targets, **options)[1]
        return torch.autograd.grad(entropy, leaves, up.to(entropy.dtype))

    found = gradients(selected_stats, dtype, entropy_grad=True, impl=impl)
    plain = gradients(reference.selected_stats, dtype)
    truth = gradients(reference.selected_stats, torch.float64)
    for one, other, exact in zip(found, plain, truth, strict=True):
        assert_as_accurate(one, other, exact, what="gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("places", [(3, 40), (3, 70), (63, 64), (511, 512), (5, 1400), (0, 1500)])
def test_ties_go_to_the_earlier_id(impl, places, dtype):
    """In one tile, in one group of tiles, and in two groups."""
    hidden, weight, _, _, _, _ = make_inputs(70, 1, 24, 1501, dtype=dtype)
    first, second = places
    weight[first] = weight[second] = 3 * hidden[7]
    hidden[:] = hidden[7]
    rows = torch.arange(70, dtype=torch.int32)
    targets = torch.full((70,), 900)
    targets[::3], targets[1::3] = first, second
    found = selected_stats(hidden, weight, rows, targets, impl=impl)
    assert torch.equal(found.top1, targets == first)
    assert torch.equal(found.logp[0], found.logp[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_words_that_are_ruled_out_have_no_share(impl, dtype, softcap):
    """A bias of -inf over whole tiles and between: p log p is 0, not NaN. Capped, it is -softcap."""
    hidden, weight, bias, rows, targets, up = make_inputs(37, 70, 45, 601, dtype=dtype, bias=True)
    out = torch.zeros(601, dtype=torch.bool)
    out[100:330] = out[::3] = out[590:] = True
    bias[out] = -torch.inf
    allowed = torch.arange(601)[~out]
    targets = allowed[targets % len(allowed)]
    inputs = (hidden, weight, bias, rows, targets, up)
    options = dict(softcap=softcap)
    found = run(selected_stats, inputs, dtype=dtype, entropy_grad=True, impl=impl, **options)
    truth = run(reference.selected_stats, inputs, dtype=torch.float64, **options)
    plain = run(reference.selected_stats, inputs, dtype=dtype, **options)
    for name, value in truth.items():
        if name == "mean_logit" and softcap is None:
            assert torch.equal(found[name], torch.full((70,), -torch.inf))
        elif name != "top1":
            assert_as_accurate(found[name], plain[name], value, what=name)
    assert torch.equal(found["top1"], truth["top1"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_that_is_ruled_out(impl, dtype):
    hidden, weight, bias, rows, targets, _ = make_inputs(37, 20, 45, 601, dtype=dtype, bias=True)
    bias[17] = -torch.inf
    targets[::4] = 17
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    found = selected_stats(*leaves, rows, targets, bias=bias, entropy_grad=True, impl=impl)
    assert torch.equal(found.logp.isneginf(), targets == 17) and not found.top1[::4].any()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = reference.selected_stats(*exact, rows, targets, bias=bias.double())
    atol = 1e-5 if dtype == torch.float32 else 5e-5
    for name in ("entropy", "log_sum_sq", "lse"):
        value = truth[VALUES.index(name)]
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=1e-5, atol=atol)
    grads = torch.autograd.grad(found.entropy.sum(), leaves)
    for one, value in zip(grads, torch.autograd.grad(truth[1].sum(), exact), strict=True):
        limit = 2e-6 if dtype == torch.float32 else 2**-7
        assert (one.double() - value).abs().max() <= limit * value.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("below", [8.0, 30.0, 41.5, 41.75, 43.0, 64.0, 150.0])
def test_targets_far_below_the_largest(impl, below, dtype):
    """e^41.6 is 2^60: on this side the squares reach 2^120, beyond it the row is done again."""
    V = 700
    z = torch.linspace(-4, 0, V).repeat(3, 1)
    z[0, 600:], z[1, 2], z[2, 650] = 0.5, 6.0, 2.0
    z[:, 300] = z.amax(-1) - below
    z = z.bfloat16().float()
    targets = torch.full((3,), 300)
    found, weight = of_logits(z, targets, dtype, impl=impl)
    truth = truth_of(z, targets)
    for name in NUMBERS:
        value = getattr(found, name).detach().double()
        torch.testing.assert_close(value, truth[name], rtol=2e-6, atol=1e-5, msg=name)
    assert not found.top1.any()
    exact = z.double().requires_grad_()
    p = exact.log_softmax(-1)
    (wanted,) = torch.autograd.grad(-(p.exp() * p).sum(), exact)
    (grad,) = torch.autograd.grad(found.entropy.sum(), weight)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    assert (grad.T.double() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_relative_precision(impl, dtype):
    """Entropies from 1e-2 to 1e-12: 1 + 1e-12 is 1 in float32."""
    z = torch.full((5, 64), -1.0)
    z[:, 20] = torch.tensor([9.0, 14.0, 20.0, 26.0, 32.0])
    targets = torch.tensor([20] * 5)
    found, weight = of_logits(z, targets, dtype, impl=impl)
    exact = z.double().requires_grad_()
    gap = exact[:, 20] + 1  # of the 63 others, each e^-gap of it
    others = 63 * (-gap).exp()
    entropy = others.log1p() + gap * others / (1 + others)
    assert entropy.min() < 1e-11
    torch.testing.assert_close(found.entropy.detach().double(), entropy.detach(), rtol=1e-5, atol=0)
    squares = (63 * (-2 * gap).exp()).log1p() - 2 * others.log1p()
    torch.testing.assert_close(found.log_sum_sq.double(), squares.detach(), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(found.entropy.sum(), weight)
    # of the certain word: -p (log p + H), where log p is about minus the others' share
    p = 1 / (1 + others)
    wanted = (-p * (-others.log1p() + entropy)).detach()
    digits = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(grad.T[:, 20].double(), wanted, rtol=digits, atol=0)


def test_not_a_number_stays_in_its_rows_and_is_not_hidden(impl):
    for dtype in DTYPES:
        hidden, weight, _, _, _, _ = make_inputs(4, 1, 16, 101, dtype=dtype)
        hidden[1, 3] = float("nan")
        rows, targets = torch.arange(4, dtype=torch.int32), torch.tensor([1, 2, 3, 4])
        found = selected_stats(hidden, weight, rows, targets, impl=impl)
        for name in NUMBERS:
            assert getattr(found, name).isnan().tolist() == [False, True, False, False], name
        weight[90, 0] = float("nan")
        found = selected_stats(hidden, weight, rows, targets, impl=impl)
        assert all(getattr(found, name).isnan().all() for name in NUMBERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    inputs = make_inputs(37, 70, 45, 5001, dtype=dtype, bias=True)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(selected_stats, inputs, dtype=dtype, entropy_grad=True))
    finally:
        torch.set_num_threads(1)
    for name, value in found[0].items():
        # the library's own products may differ
        assert name not in VALUES or torch.equal(found[1][name], value), name
