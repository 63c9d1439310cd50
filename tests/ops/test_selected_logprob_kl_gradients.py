"""The same for any schedule and budget: bits, sums over chunks, and who gets a gradient."""

import pytest
import torch
from numerics import max_error
from ops import implementations
from ops.kl_cases import DIRECTIONS, SCHEDULES, budget_for, checked, make_inputs, run

from sepo.ops import selected_logprob_kl
from sepo_kernels.selected_logprob_kl import IMPLS, reference
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

DEFINITION = reference.selected_logprob_kl

impl = implementations.fixture(IMPLS)


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeatable_bit_for_bit(impl, direction, schedule):
    i = make_inputs(37, 53, 45, 29, 101, bias=True)
    options = dict(schedule=schedule, budget=budget_for(schedule, 101), impl=impl)
    first, second = (run(selected_logprob_kl, i, direction=direction, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_for_any_budget_up_to_the_rounding_of_chunk_sums(impl, direction, dtype):
    i = make_inputs(37, 53, 45, 29, 101, bias=True, dtype=dtype)
    options = dict(direction=direction, softcap=9.0, impl=impl)
    for leaves in ("save", "save frozen"):
        whole = run(selected_logprob_kl, i, schedule=leaves, **options)
        for rows in (1, 2, 7, 52, 53, 54):
            budget = rows * 101 * 14
            part = run(selected_logprob_kl, i, schedule=leaves, budget=budget, **options)
            for name, value in whole.items():
                # float32: logits of another chunk size are summed in another order too.
                # bfloat16: each chunk's product is rounded once, then summed in float32
                factor = 8 if value.dtype == torch.float32 else 4
                limit = factor * torch.finfo(value.dtype).eps * value.abs().max().item()
                assert max_error(part[name], value.double()) <= limit, (rows, name)


def test_weight_gradient_is_summed_over_chunks_in_float32(impl, direction):
    """400 chunks of one row, all alike: a bfloat16 sum stops growing after 256 terms."""
    i = make_inputs(1, 1, 16, 16, 31, dtype=torch.bfloat16, bias=True)
    rows, targets = torch.zeros(400, dtype=torch.int32), torch.zeros(400, dtype=torch.int64)
    i = i._replace(rows=rows, targets=targets, upstream=torch.ones(2, 400))
    truth = run(DEFINITION, i, dtype=torch.float64, direction=direction)
    budget = TwoHeadLayout(31, torch.bfloat16, torch.bfloat16, False).row_bytes(gradient=True)
    ours = run(selected_logprob_kl, i, budget=budget, direction=direction, impl=impl)
    for name in ("weight", "bias"):
        # both blocks, their sum, the product and the sum of chunks are each rounded once
        error = (ours[name].double() - truth[name]).abs().max()
        assert error <= 4 * 2**-8 * truth[name].abs().max(), name


@pytest.mark.parametrize("schedule", ["save", "recompute", "frozen_head"])
def test_gradients_of_repeated_rows_add_up(impl, direction, schedule):
    """Row 2 read 20 times weighs 20 times as much as row 2 read once."""
    i = make_inputs(4, 1, 16, 8, 31, dtype=torch.float64)
    i = i._replace(rows=torch.tensor([2], dtype=torch.int32))
    often = i._replace(
        rows=i.rows.repeat(20), targets=i.targets.repeat(20), upstream=i.upstream.repeat(1, 20)
    )
    once = run(selected_logprob_kl, i, direction=direction, impl=impl)
    budget = budget_for(schedule, 31, torch.float64)
    fn = checked(schedule, 20)
    many = run(fn, often, schedule=schedule, budget=budget, direction=direction, impl=impl)
    for name in many.keys() & {"hidden", "weight"}:
        torch.testing.assert_close(many[name], 20 * once[name])


@pytest.mark.parametrize("schedule", ["save", "recompute", "frozen_head"])
def test_backward_twice_gives_the_same(impl, direction, schedule):
    i = make_inputs(37, 23, 45, 29, 101)
    leaves = (i.hidden,) if schedule == "frozen_head" else (i.hidden, i.weight)
    for x in leaves:
        x.requires_grad_()
    logp, _, kl = i.call(
        checked(schedule, 23), direction=direction, budget=budget_for(schedule, 101), impl=impl
    )
    grad = lambda **k: torch.autograd.grad((logp, kl), leaves, tuple(i.upstream), **k)
    first, second = grad(retain_graph=True), grad()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("schedule", ["save", "recompute", "frozen_head"])
def test_either_output_may_be_unused(impl, direction, schedule):
    i = make_inputs(37, 23, 45, 29, 101, dtype=torch.float64)
    i.hidden.requires_grad_()
    if schedule != "frozen_head":
        i.weight.requires_grad_()
    budget = budget_for(schedule, 101, torch.float64)
    options = dict(direction=direction, budget=budget, impl=impl)
    grad = lambda outs, used: torch.autograd.grad(outs[used].sum(), i.hidden)[0]
    for used in (0, 2):
        truth = grad(i.call(DEFINITION, direction=direction), used)
        ours = grad(i.call(checked(schedule, 23), **options), used)
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def test_the_reference_gets_no_gradient(impl, direction):
    i = make_inputs(37, 23, 45, 29, 101, bias=True)
    for x in i[3:6]:
        x.requires_grad_()
    assert not any(x.requires_grad for x in i.call(selected_logprob_kl, direction=direction))
    i.hidden.requires_grad_()
    logp, ref_logp, kl = i.call(selected_logprob_kl, direction=direction, impl=impl)
    assert logp.requires_grad and kl.requires_grad and not ref_logp.requires_grad
    (logp + kl).sum().backward()
    assert i.hidden.grad is not None and all(x.grad is None for x in i[3:6])


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("schedule", ["save", "recompute"])
def test_only_what_needs_a_gradient_gets_one(impl, direction, need, schedule):
    i = make_inputs(37, 23, 45, 29, 101, bias=True, dtype=torch.float64)
    options = dict(direction=direction, budget=budget_for(schedule, 101, torch.float64), impl=impl)
    full = run(selected_logprob_kl, i, **options)
    names = ("hidden", "weight", "bias")
    leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip(i[:3], need, strict=True)]
    logp, _, kl = i._replace(**dict(zip(names, leaves, strict=True))).call(
        selected_logprob_kl, **options
    )
    torch.autograd.backward((logp, kl), tuple(i.upstream.double()))
    for x, n, name in zip(leaves, need, names, strict=True):
        assert (x.grad is not None) == bool(n)
        if n:
            torch.testing.assert_close(x.grad, full[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_rows_is_a_differentiable_zero(impl, direction, frozen):
    i = make_inputs(8, 0, 16, 24, 31, bias=True)
    leaves = i[:1] if frozen else i[:3]
    for x in leaves:
        x.requires_grad_()
    logp, ref_logp, kl = i.call(selected_logprob_kl, direction=direction, impl=impl)
    assert logp.shape == ref_logp.shape == kl.shape == (0,)
    (logp.sum() + kl.sum()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_rows_of_a_wider_buffer(impl, direction):
    """Only the last dimension must be contiguous: a slice of columns is read where it lies."""
    i = make_inputs(9, 17, 10, 6, 33, dtype=torch.float64)
    straight = run(selected_logprob_kl, i, direction=direction, impl=impl)
    wide = lambda x: torch.randn(len(x), 20, dtype=x.dtype)[:, 3 : 3 + x.shape[1]].copy_(x)
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    j = i._replace(**{name: wide(getattr(i, name)) for name in names})
    assert not any(getattr(j, name).is_contiguous() for name in names)
    j.hidden.requires_grad_(), j.weight.requires_grad_()
    logp, ref_logp, kl = j.call(selected_logprob_kl, direction=direction, impl=impl)
    grads = torch.autograd.grad((logp, kl), (j.hidden, j.weight), tuple(j.upstream.double()))
    for a, b in zip((logp, ref_logp, kl, *grads), straight.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
