"""The right function, its derivative, and the same answer for every schedule and budget."""

from itertools import product

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops import implementations
from ops.logprob_cases import (
    SCHEDULES,
    SHAPES,
    VARIANTS,
    budget_for,
    checked,
    make_inputs,
    run,
)

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels.selected_logprob import IMPLS, reference
from sepo_kernels.selected_logprob.layout import HeadLayout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


impl = implementations.fixture(IMPLS)


def all_three(shape, variant, schedule, dtype, impl):
    """(ours, plain PyTorch in dtype, truth in float64) from the same inputs, rounded to dtype."""
    N, M, D, V = shape
    options = dict(VARIANTS[variant])
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    truth = run(
        reference.selected_logprob, inputs, dtype=torch.float64, schedule=schedule, **options
    )
    plain = run(reference.selected_logprob, inputs, dtype=dtype, schedule=schedule, **options)
    budget = budget_for(schedule, V, dtype, impl=impl, **options)
    ours = run(
        checked(schedule, M), inputs, dtype=dtype, schedule=schedule, budget=budget, impl=impl,
        **options,
    )  # fmt: skip
    return ours, plain, truth


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_equals_the_definition_in_float64(impl, shape, variant, schedule):
    ours, _, truth = all_three(shape, variant, schedule, torch.float64, impl)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "variant", "schedule"),
    [
        case
        for case in product(SHAPES, ["plain", "all"], SCHEDULES)
        # of the large vocabularies all options together go through one schedule only: time
        if case[0][3] <= 1000 or case[1] == "plain" or case[2] == "recompute"
    ],
    ids=str,
)
def test_as_accurate_as_plain_pytorch(impl, shape, variant, schedule, dtype):
    ours, plain, truth = all_three(shape, variant, schedule, dtype, impl)
    assert ours["logp"].dtype == torch.float32
    for name, value in truth.items():
        assert_as_accurate(ours[name], plain[name], value, what=name)
    if dtype != torch.float32:  # log-sum-exp from logits that were never rounded
        assert max_error(ours["logp"], truth["logp"]) < 1e-4


def test_logits_of_confident_bfloat16_rows_are_not_rounded(impl):
    """Logits of about 60: rounded to bfloat16 they are off by up to 0.125."""
    hidden, weight, _, rows, _, _ = make_inputs(8, 8, 64, 301, dtype=torch.bfloat16)
    weight = weight * 8
    targets = (hidden.double()[rows] @ weight.double().T).argmax(-1)
    truth = reference.selected_logprob(hidden.double(), weight.double(), rows, targets)
    ours = selected_logprob(hidden, weight, rows, targets, impl=impl)
    assert max_error(ours, truth) < 1e-4


def test_gradient_of_a_confident_row_keeps_its_relative_precision(impl):
    """p = 1 - 1e-4: rounded to bfloat16 p is 1, and p - 1 would be 0."""
    hidden = torch.eye(4, dtype=torch.bfloat16)[:1].clone().requires_grad_()
    weight = torch.tensor([[10.0], [0.5], [0.0], [-1.0]]).bfloat16() * torch.eye(4)[0].bfloat16()
    weight = weight.requires_grad_()
    rows, targets = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    selected_logprob(hidden, weight, rows, targets, impl=impl).sum().backward()
    exact = weight.detach().double().requires_grad_()
    reference.selected_logprob(hidden.detach().double(), exact, rows, targets).sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=2**-7, atol=0)


@pytest.mark.parametrize("budget", [None, 2 * 3 * 8 * 11], ids=["save", "recompute"])
def test_gradcheck(impl, budget):
    hidden, weight, bias, rows, targets, _ = make_inputs(
        5, 7, 3, 11, dtype=torch.float64, bias=True
    )
    for x in (hidden, weight, bias):
        x.requires_grad_()
    options = dict(scale=0.8, softcap=2.5, budget=budget, impl=impl)
    op = lambda h, w, b: selected_logprob(h, w, rows, targets, bias=b, **options)
    assert torch.autograd.gradcheck(op, (hidden, weight, bias))
    frozen = lambda h: selected_logprob(
        h, weight.detach(), rows, targets, bias=bias.detach(), **options
    )
    assert torch.autograd.gradcheck(frozen, (hidden,))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeatable_bit_for_bit(impl, schedule):
    inputs = make_inputs(37, 53, 45, 101, bias=True)
    op = dict(schedule=schedule, budget=budget_for(schedule, 101, impl=impl), impl=impl)
    first, second = (run(selected_logprob, inputs, dtype=torch.float32, **op) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_for_any_budget_up_to_the_rounding_of_chunk_sums(impl, dtype):
    inputs = make_inputs(37, 53, 45, 101, bias=True, dtype=dtype)
    whole = run(selected_logprob, inputs, dtype=dtype, softcap=9.0, impl=impl)
    # from one row at a time to all of them
    for rows in (1, 2, 7, 52, 53, 54):
        budget = rows * 101 * 12
        part = run(selected_logprob, inputs, dtype=dtype, softcap=9.0, impl=impl, budget=budget)
        for name, value in whole.items():
            # bfloat16: each chunk's product is rounded once, then summed in float32
            eps = torch.finfo(value.dtype).eps
            limit = 4 * eps * value.abs().max().item()
            assert max_error(part[name], value.double()) <= limit, (rows, name)


def test_weight_gradient_is_summed_over_chunks_in_float32(impl):
    """400 chunks of one row, all alike: a bfloat16 sum stops growing after 256 terms."""
    hidden, weight, _, _, _, _ = make_inputs(1, 1, 16, 31, dtype=torch.bfloat16)
    rows, targets = torch.zeros(400, dtype=torch.int32), torch.zeros(400, dtype=torch.int64)
    inputs = (hidden, weight, None, rows, targets, torch.ones(400))
    truth = run(reference.selected_logprob, inputs, dtype=torch.float64)["weight"]
    budget = HeadLayout(31, torch.bfloat16, False, fused=False).row_bytes(gradient=True)
    ours = run(selected_logprob, inputs, dtype=torch.bfloat16, budget=budget, impl=impl)["weight"]
    # slope, scaled row, product and sum are each rounded once
    torch.testing.assert_close(ours.double(), truth, rtol=4 * 2**-8, atol=0)


@pytest.mark.parametrize("budget", [None, 5 * 16 * 31], ids=["save", "recompute"])
def test_gradients_of_repeated_rows_add_up(impl, budget):
    """Row 2 read 20 times weighs 20 times as much as row 2 read once."""
    hidden, weight, _, _, _, _ = make_inputs(4, 1, 16, 31, dtype=torch.float64)
    once = hidden.clone().requires_grad_()
    row, target = torch.tensor([2], dtype=torch.int32), torch.tensor([7])
    selected_logprob(once, weight, row, target, impl=impl).sum().backward()
    often = hidden.clone().requires_grad_()
    for w in (weight, weight.clone().requires_grad_()):
        often.grad = None
        logp = selected_logprob(often, w, row.repeat(20), target.repeat(20), budget=budget)
        logp.sum().backward()
        torch.testing.assert_close(often.grad, 20 * once.grad)


@pytest.mark.parametrize("budget", [None, 5 * 16 * 101], ids=["save", "recompute"])
def test_backward_twice_gives_the_same(impl, budget):
    hidden, weight, _, rows, targets, up = make_inputs(37, 23, 45, 101)
    hidden.requires_grad_(), weight.requires_grad_()
    logp = selected_logprob(hidden, weight, rows, targets, budget=budget, impl=impl)
    first = torch.autograd.grad(logp, (hidden, weight), up, retain_graph=True)
    second = torch.autograd.grad(logp, (hidden, weight), up)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_no_rows_is_a_differentiable_zero(impl, frozen):
    hidden, weight, bias, rows, targets, _ = make_inputs(8, 0, 16, 31, bias=True)
    leaves = [hidden] if frozen else [hidden, weight, bias]
    for x in leaves:
        x.requires_grad_()
    logp = selected_logprob(hidden, weight, rows, targets, bias=bias, impl=impl)
    assert logp.shape == (0,) and logp.grad_fn is not None
    logp.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_rows_of_a_wider_buffer(impl):
    hidden, weight, _, rows, targets, up = make_inputs(9, 13, 10, 33, dtype=torch.float64)
    straight = run(selected_logprob, (hidden, weight, None, rows, targets, up), dtype=torch.float64)
    h, w = (torch.cat([x, x], 1)[:, : x.shape[1]].requires_grad_() for x in (hidden, weight))
    assert not h.is_contiguous() and not w.is_contiguous()
    logp = selected_logprob(h, w, rows, targets, impl=impl)
    grads = torch.autograd.grad(logp, (h, w), up.double())
    for a, b in zip((logp, *grads), straight.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("schedule", ["save", "recompute"])
def test_only_what_needs_a_gradient_gets_one(impl, need, schedule):
    *tensors, rows, targets, up = make_inputs(37, 23, 45, 101, bias=True, dtype=torch.float64)
    budget = budget_for(schedule, 101, torch.float64, impl=impl)
    full = run(selected_logprob, (*tensors, rows, targets, up), dtype=torch.float64, budget=budget)
    leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip(tensors, need, strict=True)]
    hidden, weight, bias = leaves
    logp = selected_logprob(hidden, weight, rows, targets, bias=bias, budget=budget, impl=impl)
    logp.backward(up.double())
    for x, n, name in zip(leaves, need, ("hidden", "weight", "bias"), strict=True):
        assert (x.grad is not None) == bool(n)
        if n:
            torch.testing.assert_close(x.grad, full[name], rtol=1e-12, atol=1e-13)


def test_autocast_does_not_reach_inside(impl):
    inputs = make_inputs(37, 23, 45, 101, bias=True)
    outside = run(selected_logprob, inputs, dtype=torch.float32, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(selected_logprob, inputs, dtype=torch.float32, impl=impl)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_explanations_name_schedule_and_reason():
    hidden, weight, _, rows, targets, _ = make_inputs(37, 23, 45, 101)
    explain = lambda **k: explain_selected_logprob(hidden, weight, rows, targets, **k)
    default = 1 << 30, "budget 1073741824 bytes, the default of a CPU"
    assert explain()[1:] == (
        "no_grad", 23, 0, 23 * 4 * 101, 1, 0, default[0],
        ("nothing needs a gradient, or no_grad", default[1]),
    )  # fmt: skip
    hidden.requires_grad_()
    assert explain()[1:] == (
        "frozen_head", 23, 0, 23 * 4 * 101, 2, 0, default[0],
        ("the head needs no gradient", default[1]),
    )  # fmt: skip
    weight.requires_grad_()
    assert explain()[1:7] == ("save", 23, 0, 23 * 4 * 101, 3, 23)
    small = explain(budget=10 * 4 * 101)
    # 23 rows in three even chunks rather than 10, 10 and 3
    assert small[1:6] == ("recompute", 8, 8, 8 * 4 * 101, 4)
    assert "saving takes 9292 bytes, budget 4040" in small.reasons[0]
    with torch.no_grad():
        assert explain().schedule == "no_grad"
    hidden.requires_grad_(False)
    assert explain().gemms == 2 and "hidden needs no gradient" in explain().reasons[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_targets_that_are_certain_or_next_to_impossible(impl, dtype, softcap):
    """logp from -1e-20 to -150 in one call: e^150 is no float32, and 1 + 1e-20 is 1."""
    V, D, size = 700, 8, 40.0
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, D, generator=g) / 8).to(dtype)
    weight[::7] = torch.eye(D)[0].to(dtype) * size / 16
    weight[5::7] = -torch.eye(D)[0].to(dtype) * size / 16
    hidden = torch.randn(6, D, generator=g).to(dtype)
    hidden[:, 0] = torch.tensor([16.0, 1.0, -16.0, 8.0, 30.0, -30.0])
    rows = torch.arange(6, dtype=torch.int32).repeat(4)
    targets = torch.tensor([0, 5, 3, 693]).repeat_interleave(6)
    up = torch.randn(24, generator=g)
    inputs = (hidden, weight, None, rows, targets, up)
    truth = run(reference.selected_logprob, inputs, dtype=torch.float64, softcap=softcap)
    plain = run(reference.selected_logprob, inputs, dtype=dtype, softcap=softcap)
    ours = run(selected_logprob, inputs, dtype=dtype, softcap=softcap, impl=impl)
    assert truth["logp"].min() < -60 and truth["logp"].max() > -6
    # relative: float32 carries a logit of 150 with seven digits
    torch.testing.assert_close(ours["logp"].double(), truth["logp"], rtol=2e-6, atol=1e-6)
    for name in ("hidden", "weight"):
        assert_as_accurate(ours[name], plain[name], truth[name], what=name)


def test_not_a_number_stays_in_its_rows_and_is_not_hidden(impl):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, _, _, _ = make_inputs(4, 1, 16, 101, dtype=dtype)
        hidden[1, 3] = float("nan")
        rows, targets = torch.arange(4, dtype=torch.int32), torch.tensor([1, 2, 3, 4])
        logp = selected_logprob(hidden, weight, rows, targets, impl=impl)
        assert logp.isnan().tolist() == [False, True, False, False]
        weight[90, 0] = float("nan")
        assert selected_logprob(hidden, weight, rows, targets, impl=impl).isnan().all()
