"""The right three numbers, their derivative, and the same answer for every schedule and budget."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate, max_error
from ops import implementations
from ops.kl_cases import (
    DIRECTIONS,
    RUNNABLE,
    SCHEDULES,
    SHAPES,
    VARIANTS,
    budget_for,
    checked,
    make_inputs,
    run,
)

from sepo.ops import selected_logprob, selected_logprob_kl
from sepo_kernels.selected_logprob_kl import IMPLS, layout, reference
from sepo_kernels.selected_logprob_kl.layout import TwoHeadLayout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEFINITION = reference.selected_logprob_kl


impl = implementations.fixture(IMPLS)


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def ours_and_truth(shape, variant, schedule, direction, dtype, impl):
    """(inputs rounded to dtype, options of the definition, ours, truth in float64)."""
    options = dict(VARIANTS[variant], direction=direction)
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    truth = run(DEFINITION, inputs, dtype=torch.float64, schedule=schedule, **options)
    ours = run(
        checked(schedule, shape[1]), inputs, schedule=schedule, impl=impl,
        budget=budget_for(schedule, shape[-1], dtype), **options,
    )  # fmt: skip
    assert ours.keys() == truth.keys()
    return inputs, options, ours, truth


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_equals_the_definition_in_float64(impl, shape, variant, schedule, direction):
    *_, ours, truth = ours_and_truth(shape, variant, schedule, direction, torch.float64, impl)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-13, msg=name)


# the large vocabularies go once through each schedule: time
LARGE = [
    ("plain", "save", "ref||policy"),
    ("all", "recompute", "policy||ref"),
    ("plain", "frozen_head", "policy||ref"),
    ("all", "no_grad", "ref||policy"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        *product(SHAPES[:4], product(["plain", "all"], SCHEDULES, DIRECTIONS)),
        *product(SHAPES[4:], LARGE),
    ],
    ids=str,
)
def test_as_accurate_as_plain_pytorch(impl, shape, case, dtype):
    inputs, options, ours, truth = ours_and_truth(shape, *case, dtype, impl)
    plain = run(DEFINITION, inputs, schedule=case[1], **options)
    for name, value in truth.items():
        assert_as_accurate(ours[name], plain[name], value, what=name)
    for name in ("logp", "ref_logp", "kl"):
        assert ours[name].dtype == torch.float32
        assert max_error(ours[name], truth[name]) < 1e-4  # from logits that were never rounded


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_setting(data):
    draw = data.draw
    shape = [
        draw(st.integers(low, high)) for low, high in ((1, 5), (0, 9), (1, 7), (1, 7), (1, 70))
    ]
    inputs = make_inputs(*shape, dtype=torch.float64, bias=draw(st.booleans()))
    options = dict(
        direction=draw(st.sampled_from(DIRECTIONS)),
        scale=draw(st.sampled_from([1.0, -0.5, 3.0])),
        softcap=draw(st.sampled_from([None, 0.5, 30.0])),
        ref_scale=draw(st.sampled_from([None, 0.25, 2.0])),
        ref_softcap=draw(st.sampled_from([None, 1.0, torch.inf])),
    )
    rows = draw(st.integers(1, 10))
    budget = rows * TwoHeadLayout(shape[-1], torch.float64, torch.float64, False).row_bytes(True)
    leaves = draw(st.sampled_from(["save", "save frozen"]))  # everything, or hidden only
    impl = draw(st.sampled_from(RUNNABLE))
    truth = run(DEFINITION, inputs, schedule=leaves, **options)
    ours = run(selected_logprob_kl, inputs, schedule=leaves, budget=budget, impl=impl, **options)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_split_into_columns(impl, direction, schedule, monkeypatch):
    """301 columns at once, or 64 at a time and the 45 that are left."""
    inputs = make_inputs(9, 20, 8, 5, 301, dtype=torch.float64, bias=True)
    options = dict(schedule=schedule, direction=direction, impl=impl, softcap=2.0, scale=0.7)
    budget = budget_for(schedule, 301, torch.float64)
    whole = run(selected_logprob_kl, inputs, budget=budget, **options)
    monkeypatch.setattr(layout, "MAX_COLUMNS", 64)
    monkeypatch.setattr(layout, "MIN_COLUMNS", 64)
    split = run(selected_logprob_kl, inputs, budget=budget, **options)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("rows", [None, 2], ids=["save", "recompute"])
def test_gradcheck(impl, direction, rows):
    i = make_inputs(5, 7, 3, 4, 11, dtype=torch.float64, bias=True)
    for x in i[:3]:
        x.requires_grad_()
    budget = rows and rows * 11 * 8 * 3
    options = dict(direction=direction, scale=0.8, softcap=2.5, ref_scale=1.5, ref_softcap=4.0)
    options |= dict(budget=budget, impl=impl)
    names = ("hidden", "weight", "bias")
    op = lambda *leaves: i._replace(**dict(zip(names, leaves, strict=True))).call(
        selected_logprob_kl, **options
    )
    assert torch.autograd.gradcheck(op, i[:3])
    frozen = i._replace(weight=i.weight.detach(), bias=i.bias.detach())
    op = lambda hidden: frozen._replace(hidden=hidden).call(selected_logprob_kl, **options)
    assert torch.autograd.gradcheck(op, (i.hidden,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_equal_heads_have_no_divergence_and_no_gradient_of_it(impl, direction, variant, dtype):
    options = dict(VARIANTS[variant], direction=direction)
    i = make_inputs(37, 23, 45, 45, 1001, dtype=dtype, bias=options.pop("bias"))
    i = i._replace(ref_hidden=i.hidden, ref_weight=i.weight, ref_bias=i.bias)
    i.upstream[0] = 0  # of logp
    for schedule in ("save", "recompute", "frozen_head", "no_grad"):
        budget = budget_for(schedule, 1001, dtype)
        ours = run(
            checked(schedule, 23), i, schedule=schedule, budget=budget, impl=impl, **options
        )  # fmt: skip
        assert torch.equal(ours["logp"], ours["ref_logp"])
        assert ours["kl"].abs().max() < 1e-6
        for name in ours.keys() - {"logp", "ref_logp", "kl"}:
            assert ours[name].abs().max() < 1e-6, name


def test_divergence_is_not_negative(impl, direction):
    """Nearly equal heads too, where the sum of p (log p - log q) is mostly rounding."""
    for seed, nearness in product(range(5), (1.0, 1e-2, 1e-4, 1e-6)):
        i = make_inputs(37, 53, 45, 45, 1001, seed=seed)
        mix = lambda a, b, t=nearness: torch.lerp(a, b, t)
        i = i._replace(
            ref_hidden=mix(i.hidden, i.ref_hidden), ref_weight=mix(i.weight, i.ref_weight)
        )
        kl = i.call(selected_logprob_kl, direction=direction, impl=impl)[2]
        assert kl.min() > -1e-6


def test_logp_is_that_of_selected_logprob(impl, direction):
    i = make_inputs(37, 53, 45, 29, 1001, bias=True, dtype=torch.bfloat16)
    options = dict(scale=0.7, softcap=9.0)
    logp, ref_logp, _ = i.call(selected_logprob_kl, direction=direction, impl=impl, **options)
    one = selected_logprob(i.hidden, i.weight, i.rows, i.targets, bias=i.bias, **options)
    other = selected_logprob(
        i.ref_hidden, i.ref_weight, i.rows, i.targets, bias=i.ref_bias, **options
    )
    torch.testing.assert_close(logp, one, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(ref_logp, other, rtol=1e-6, atol=3e-6)


def test_one_direction_is_the_other_with_the_heads_exchanged(impl):
    i = make_inputs(37, 53, 45, 29, 1001, bias=True)
    j = i._replace(
        hidden=i.ref_hidden, weight=i.ref_weight, bias=i.ref_bias,
        ref_hidden=i.hidden, ref_weight=i.weight, ref_bias=i.bias,
    )  # fmt: skip
    logp, ref_logp, kl = i.call(selected_logprob_kl, direction="ref||policy", impl=impl)
    exchanged = j.call(selected_logprob_kl, direction="policy||ref", impl=impl)
    for a, b in zip((ref_logp, logp, kl), exchanged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-6)


# Words that a head rules out with a bias of -inf, as the padding of a vocabulary


def ruled_out(inputs, policy: list[int], reference: list[int]):
    """Both biases, -inf at these words; no target among them."""
    bias, ref_bias = inputs.bias.clone(), inputs.ref_bias.clone()
    bias[policy], ref_bias[reference] = -torch.inf, -torch.inf
    inputs = inputs._replace(bias=bias, ref_bias=ref_bias)
    out = torch.tensor(sorted({*policy, *reference}))
    return inputs._replace(targets=torch.where(torch.isin(inputs.targets, out), 0, inputs.targets))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_words_that_both_heads_rule_out_are_not_there(impl, direction, schedule, dtype):
    """The vocabulary without them has the same values and gradients; theirs are exactly zero."""
    padded = [5, 29, 30]
    whole = ruled_out(make_inputs(9, 20, 24, 16, 31, bias=True, dtype=dtype), padded, padded)
    kept = [v for v in range(31) if v not in padded]
    of_kept = lambda x: x[kept].contiguous()
    cut = whole._replace(
        **{
            name: of_kept(getattr(whole, name))
            for name in whole._fields[1:6]
            if "hidden" not in name
        },
        targets=torch.searchsorted(torch.tensor(kept), whole.targets),
    )
    options = dict(direction=direction, impl=impl, schedule=schedule)
    budgets = (budget_for(schedule, V, dtype) for V in (31, 28))
    ours, truth = (
        run(selected_logprob_kl, i, budget=b, **options)
        for i, b in zip((whole, cut), budgets, strict=True)
    )
    for name, value in truth.items():
        found = ours[name]
        if name in ("weight", "bias"):
            assert not found[padded].any(), name
            found = found[kept]
        # a shorter row and another shape of product are summed in another order
        limit = 32 * torch.finfo(value.dtype).eps * value.abs().max().item()
        torch.testing.assert_close(found, value, rtol=0, atol=limit)


@pytest.mark.parametrize("fn", [DEFINITION, selected_logprob_kl], ids=["definition", "ops"])
def test_a_word_without_weight_adds_nothing(fn, impl, direction):
    """0 (log 0 - log q) is 0: only one head rules the word out, the one that weighs."""
    some = [3, 17]
    first, second = (some, []) if direction == "policy||ref" else ([], some)
    i = ruled_out(make_inputs(9, 20, 24, 16, 31, bias=True, dtype=torch.float64), first, second)
    options = {} if fn is DEFINITION else dict(impl=impl)
    found = run(fn, i, direction=direction, **options)

    logits = (
        i.hidden[i.rows] @ i.weight.T + i.bias,
        i.ref_hidden[i.rows] @ i.ref_weight.T + i.ref_bias,
    )
    p, q = (x.softmax(-1) for x in logits)
    seen = [v for v in range(31) if v not in some]
    ratio = (p[:, seen] / q[:, seen]).log()
    kl = (p[:, seen] * ratio if direction == "policy||ref" else -q[:, seen] * ratio).sum(-1)
    torch.testing.assert_close(found["kl"], kl, rtol=1e-12, atol=1e-13)
    # dKL/dz, by hand
    grad = p * ((p / q).log() - kl[:, None]) if direction == "policy||ref" else p - q
    grad = grad.nan_to_num(0) * i.upstream[1].double()[:, None]
    onehot = torch.nn.functional.one_hot(i.targets, 31)
    grad += (onehot - p) * i.upstream[0].double()[:, None]
    torch.testing.assert_close(found["bias"], grad.sum(0), rtol=1e-12, atol=1e-13)


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
