"""The right statistics and their derivatives, for every schedule."""

from itertools import product

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops import implementations, logprob_cases
from ops.stats_cases import ENTROPY, METRIC, SHAPES, VALUES, VARIANTS, WAYS, make_inputs, ours, run

from sepo.ops import selected_logprob, selected_logprob_kl, selected_stats
from sepo_kernels.selected_stats import IMPLS, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


impl = implementations.fixture(IMPLS)


def all_three(shape, variant, way, dtype, impl):
    """(ours, plain PyTorch in dtype, truth in float64) from the same inputs, rounded to dtype."""
    options = dict(VARIANTS[variant])
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    definition = lambda dtype: run(
        reference.selected_stats, inputs, dtype=dtype, way=way, **options
    )
    found = ours(inputs, dtype=dtype, way=way, impl=impl, **options)
    return found, definition(dtype), definition(torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_equals_the_definition_in_float64(impl, shape, variant, way):
    found, _, truth = all_three(shape, variant, way, torch.float64, impl)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "variant", "way"),
    [
        case
        for case in product(SHAPES, ["plain", "all"], WAYS)
        # of the large vocabularies all options together go through two ways only: time
        if case[0][3] <= 1000 or case[1] == "plain" or case[2].endswith("recompute")
    ],
    ids=str,
)
def test_as_accurate_as_plain_pytorch(impl, shape, variant, way, dtype):
    found, plain, truth = all_three(shape, variant, way, dtype, impl)
    for name, value in truth.items():
        if name == "top1":  # of rounded logits plain PyTorch's may differ
            assert found[name].dtype == torch.bool
            continue
        assert name not in VALUES or found[name].dtype == torch.float32
        assert_as_accurate(found[name], plain[name], value, what=name)
    assert torch.equal(found["top1"], truth["top1"])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("way", METRIC)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_metric_changes_no_bit_of_the_log_probability(impl, variant, way, dtype):
    options = dict(VARIANTS[variant])
    inputs = make_inputs(37, 90, 45, 601, dtype=dtype, bias=options.pop("bias"))
    found = ours(inputs, dtype=dtype, way=way, impl=impl, **options)
    budget = logprob_cases.budget_for(way, 601, dtype, impl=impl, **options)
    alone = logprob_cases.run(
        selected_logprob, inputs, dtype=dtype, schedule=way, budget=budget, impl=impl, **options
    )
    for name, value in alone.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_values_are_the_same_with_a_gradient_of_the_entropy(impl, dtype):
    inputs = make_inputs(37, 90, 45, 601, dtype=dtype, bias=True)
    options = dict(dtype=dtype, impl=impl, softcap=5.0, scale=0.7)
    before = ours(inputs, way="save", **options)
    after = ours(inputs, way="entropy save", **options)
    for name in VALUES:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", ENTROPY)
@pytest.mark.parametrize("variant", VARIANTS)
def test_entropy_is_that_of_a_divergence_from_the_uniform_distribution(impl, variant, way):
    """H = log V - KL(p || uniform): selected_logprob_kl with a reference whose weight is zero."""
    options, V = dict(VARIANTS[variant]), 101
    inputs = make_inputs(37, 23, 45, V, dtype=torch.float64, bias=options.pop("bias"))
    nothing = torch.zeros(37, 1).double(), torch.zeros(V, 1).double()

    def by_kl(hidden, weight, rows, targets, **kind):
        logp, _, kl = selected_logprob_kl(
            hidden, weight, *nothing, rows, targets, direction="policy||ref", impl="chunked",
            **kind,
        )  # fmt: skip
        entropy = torch.tensor(V).double().log() - kl
        return logp, entropy, logp, logp, logp, logp

    expected = run(by_kl, inputs, dtype=torch.float64, way=way, **options)
    found = ours(inputs, dtype=torch.float64, way=way, impl=impl, **options)
    for name in {"logp", "entropy", *WAYS[way].leaves.split()} & expected.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("budget", [None, 2 * 3 * 8 * 11], ids=["save", "recompute"])
def test_gradcheck(impl, budget):
    hidden, weight, bias, rows, targets, _ = make_inputs(
        5, 7, 3, 11, dtype=torch.float64, bias=True
    )
    for x in (hidden, weight, bias):
        x.requires_grad_()
    options = dict(scale=0.8, softcap=2.5, entropy_grad=True, budget=budget, impl=impl)
    op = lambda h, w, b: selected_stats(h, w, rows, targets, bias=b, **options)[:2]
    assert torch.autograd.gradcheck(op, (hidden, weight, bias))
    frozen = lambda h: selected_stats(
        h, weight.detach(), rows, targets, bias=bias.detach(), **options
    )[:2]
    assert torch.autograd.gradcheck(frozen, (hidden,))


@pytest.mark.parametrize("way", ENTROPY)
def test_backward_twice_gives_the_same(impl, way):
    hidden, weight, _, rows, targets, up = make_inputs(37, 23, 45, 101)
    hidden.requires_grad_(), weight.requires_grad_()
    budget = None if "save" in way else 5 * 4 * 101 * 2
    found = selected_stats(
        hidden, weight, rows, targets, entropy_grad=True, budget=budget, impl=impl
    )
    grad = lambda **keep: torch.autograd.grad(found[:2], (hidden, weight), (up, up.flip(0)), **keep)
    first, second = grad(retain_graph=True), grad()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_has_a_gradient(impl):
    hidden, weight, _, rows, targets, _ = make_inputs(37, 23, 45, 101)
    call = lambda **options: selected_stats(hidden, weight, rows, targets, impl=impl, **options)
    assert not any(x.requires_grad for x in call(entropy_grad=True))
    hidden.requires_grad_()
    having = lambda found: [name for name in VALUES if getattr(found, name).requires_grad]
    assert having(call()) == ["logp"]
    assert having(call(entropy_grad=True)) == ["logp", "entropy"]
    with torch.no_grad():
        assert having(call(entropy_grad=True)) == []


def test_either_gradient_alone(impl):
    inputs = make_inputs(37, 23, 45, 101, dtype=torch.float64)
    hidden, weight, _, rows, targets, up = inputs
    up = up.double()

    def gradient(fn, index, **options):
        h = hidden.clone().requires_grad_()
        found = fn(h, weight, rows, targets, **options)[index]
        return torch.autograd.grad(found, h, up)[0]

    for index in (0, 1):
        found = gradient(selected_stats, index, entropy_grad=True, impl=impl)
        expected = gradient(reference.selected_stats, index)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", ["save", "entropy save", "entropy save frozen"])
def test_no_rows_is_a_differentiable_zero(impl, way):
    inputs = make_inputs(8, 0, 16, 31, bias=True)
    found = ours(inputs, dtype=torch.float32, way=way, impl=impl)
    assert all(found[name].shape == (0,) for name in VALUES)
    assert all(not found[name].any() for name in WAYS[way].leaves.split())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeatable_bit_for_bit(impl, dtype):
    inputs = make_inputs(37, 53, 45, 1101, bias=True, dtype=dtype)
    for way in WAYS:
        first, second = (ours(inputs, dtype=dtype, way=way, impl=impl) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), way


@pytest.mark.parametrize("way", ENTROPY)
def test_a_scale_for_each_row(impl, way):
    inputs = make_inputs(37, 70, 45, 101, bias=True, dtype=torch.float64)
    each = torch.logspace(-0.4, 0.4, 70).double()
    found = ours(inputs, dtype=torch.float64, way=way, impl=impl, scale=each, softcap=5.0)
    truth = run(
        reference.selected_stats, inputs, dtype=torch.float64, way=way, scale=each, softcap=5.0
    )
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_equal_scales_give_the_bits_of_one(impl, way, dtype):
    inputs = make_inputs(37, 70, 45, 101, bias=True, dtype=dtype)
    one, each = (
        ours(inputs, dtype=dtype, way=way, impl=impl, scale=scale, softcap=5.0)
        for scale in (0.7, torch.full((70,), 0.7))
    )
    assert all(torch.equal(one[name], each[name]) for name in one)


def test_autocast_does_not_reach_inside(impl):
    inputs = make_inputs(37, 23, 45, 101, bias=True)
    outside = ours(inputs, dtype=torch.float32, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(inputs, dtype=torch.float32, impl=impl)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_weight_gradient_is_summed_over_chunks_in_float32(impl):
    """400 chunks of one row, all alike: a bfloat16 sum stops growing after 256 terms."""
    hidden, weight, *_ = make_inputs(1, 1, 16, 31, dtype=torch.bfloat16)
    rows, targets = torch.zeros(400, dtype=torch.int32), torch.zeros(400, dtype=torch.int64)
    inputs = (hidden, weight, None, rows, targets, torch.ones(400))
    truth = run(reference.selected_stats, inputs, dtype=torch.float64)["weight"]
    found = run(
        selected_stats, inputs, dtype=torch.bfloat16, entropy_grad=True, budget=6 * 31, impl=impl
    )["weight"]
    limit = 4 * 2**-8 * truth.abs().max().item()
    assert max_error(found, truth) <= limit
