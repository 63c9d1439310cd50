"""The right three numbers and their derivative, for every schedule."""

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
