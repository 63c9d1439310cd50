"""The Jensen-Shannon divergence of selected_logprob_kl: its definition, its bounds, its ends."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops.kl_cases import (
    RUNNABLE,
    SCHEDULES,
    SHAPES,
    VARIANTS,
    Inputs,
    budget_for,
    checked,
    make_inputs,
    run,
)
from torch.special import xlogy
from torch.utils.flop_counter import FlopCounterMode

from sepo.ops import explain_selected_logprob_kl, selected_logprob_kl
from sepo_kernels import extension
from sepo_kernels.selected_logprob_kl import reference

DEFINITION = reference.selected_logprob_kl
BETAS = [0.1, 0.5, 0.97]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEVERAL_COLUMNS = (9, 20, 24, 16, 5003)  # as SHAPES, more words than a buffer of columns


def all_and_truth(shape, variant, schedule, beta, dtype):
    """(inputs rounded to dtype, options of the definition, ours of each, truth in float64)."""
    options = dict(VARIANTS[variant], direction=("jsd", beta))
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    truth = run(DEFINITION, inputs, dtype=torch.float64, schedule=schedule, **options)
    budget = budget_for(schedule, shape[-1], dtype)
    options |= dict(schedule=schedule)
    call = checked(schedule, shape[1])
    ours = [run(call, inputs, budget=budget, impl=impl, **options) for impl in RUNNABLE]
    assert all(one.keys() == truth.keys() for one in ours)
    return inputs, options, ours, truth


def test_the_definition_is_the_papers_formula():
    """GKD's equation 1, with nothing shared."""
    i = make_inputs(*SHAPES[1], dtype=torch.float64, bias=True)
    softmax = lambda x, w, b: (x[i.rows] @ w.T + b).softmax(-1)
    p, q = softmax(i.hidden, i.weight, i.bias), softmax(i.ref_hidden, i.ref_weight, i.ref_bias)
    kl = lambda a, b: (xlogy(a, a) - xlogy(a, b)).sum(-1)
    for beta in BETAS:
        m = beta * q + (1 - beta) * p
        found = i.call(DEFINITION, direction=("jsd", beta))[2]
        torch.testing.assert_close(found, beta * kl(q, m) + (1 - beta) * kl(p, m))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("shape", "variant"),
    [(SHAPES[1], variant) for variant in VARIANTS] + [(shape, "all") for shape in SHAPES[2:4]],
    ids=str,
)
def test_equals_the_definition_in_float64(shape, variant, schedule):
    for beta in BETAS:
        *_, ours, truth = all_and_truth(shape, variant, schedule, beta, torch.float64)
        for one, name in product(ours, truth):
            torch.testing.assert_close(one[name], truth[name], rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [SHAPES[1], SEVERAL_COLUMNS], ids=str)
def test_as_accurate_as_plain_pytorch(shape, schedule, dtype):
    for variant, beta in (("plain", 0.5), ("all", 0.1)):
        inputs, options, ours, truth = all_and_truth(shape, variant, schedule, beta, dtype)
        plain = run(DEFINITION, inputs, **options)
        for one, name in product(ours, truth):
            assert_as_accurate(one[name], plain[name], truth[name], what=f"{variant} {name}")
            assert max_error(one["kl"], truth["kl"]) < 1e-5  # from logits that were never rounded


@pytest.mark.parametrize("rows", [None, 2], ids=["save", "recompute"])
@pytest.mark.parametrize("impl", RUNNABLE)
def test_gradcheck(rows, impl):
    i = make_inputs(5, 7, 3, 4, 11, dtype=torch.float64, bias=True)
    leaves = [x.requires_grad_() for x in i[:3]]
    options = dict(direction=("jsd", 0.3), scale=0.8, softcap=2.5, ref_scale=1.5, ref_softcap=4.0)
    options |= dict(budget=rows and rows * 11 * 8 * 3, impl=impl)
    op = lambda *leaves: Inputs(*leaves, *i[3:]).call(selected_logprob_kl, **options)
    assert torch.autograd.gradcheck(op, leaves)
    fixed = i.weight.detach(), i.bias.detach()
    assert torch.autograd.gradcheck(lambda hidden: op(hidden, *fixed), leaves[:1])


def test_symmetric_at_a_half():
    i = make_inputs(37, 53, 45, 29, 1001, bias=True)
    j = Inputs(*i[3:6], *i[:3], *i[6:])
    for impl in RUNNABLE:
        options = dict(direction=("jsd", 0.5), impl=impl)
        logp, ref_logp, jsd = i.call(selected_logprob_kl, **options)
        exchanged = j.call(selected_logprob_kl, **options)
        for a, b in zip((ref_logp, logp, jsd), exchanged, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("beta", "direction"), [(1e-7, "ref||policy"), (1 - 1e-7, "policy||ref")])
def test_towards_its_ends_it_is_a_kl(beta, direction):
    """Both fall with the weight that is left, the value and the gradient.

    What is missing is that weight times the mean of a likelihood ratio: small for flat heads alone.
    """
    i = make_inputs(*SHAPES[1], dtype=torch.float64)
    i.upstream[0] = 0  # of logp
    kl = run(selected_logprob_kl, i, direction=direction, scale=0.1)
    for impl in RUNNABLE:
        jsd = run(selected_logprob_kl, i, direction=("jsd", beta), scale=0.1, impl=impl)
        for name in ("kl", "hidden", "weight"):
            found = jsd[name] / min(beta, 1 - beta)
            torch.testing.assert_close(found, kl[name], rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("gap", [1.0, 200.0, 1e4])
def test_bounded_and_finite_for_any_gap(gap, dtype):
    """Logits of +-gap on opposite sides: one head is sure of what the other rules out."""
    hidden = torch.eye(2).to(dtype)
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.5]]).to(dtype) * gap
    i = make_inputs(2, 3, 2, 2, 3, dtype=dtype)
    i = i._replace(hidden=hidden, weight=weight, ref_hidden=hidden.flip(0), ref_weight=weight)
    i = i._replace(rows=torch.tensor([0, 0, 1], dtype=torch.int32), targets=torch.arange(3))
    for beta, impl in product((*BETAS, 1e-9, 1 - 1e-9), RUNNABLE):
        ours = run(selected_logprob_kl, i, direction=("jsd", beta), impl=impl)
        truth = run(DEFINITION, i, dtype=torch.float64, direction=("jsd", beta))
        assert 0 <= ours["kl"].min() and ours["kl"].max() <= math.log(2) * (1 + 1e-6)
        for name, value in truth.items():
            limit = 4 * torch.finfo(ours[name].dtype).eps
            error = (ours[name].double() - value).abs().max()
            assert error <= limit * max(1, value.abs().max()), (beta, impl, name)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_heads_have_none_and_no_gradient_of_it(schedule, dtype):
    i = make_inputs(37, 23, 45, 45, 1001, dtype=dtype, bias=True)
    i = i._replace(ref_hidden=i.hidden, ref_weight=i.weight, ref_bias=i.bias)
    i.upstream[0] = 0  # of logp
    for impl in RUNNABLE:
        options = dict(budget=budget_for(schedule, 1001, dtype), direction=("jsd", 0.3), impl=impl)
        ours = run(checked(schedule, 23), i, schedule=schedule, **options)
        assert torch.equal(ours["logp"], ours["ref_logp"])
        assert all(ours[name].abs().max() < 1e-6 for name in ours.keys() - {"logp", "ref_logp"})


def test_small_divergences_keep_their_digits():
    """Heads that differ by 0.4 %: about 1e-5 nats."""
    i = make_inputs(96, 96, 64, 48, 5003, dtype=torch.bfloat16, seed=3)
    noise = torch.randn(5003, 64, generator=torch.Generator().manual_seed(1))
    near = (i.weight.float() * (1 + 0.004 * noise)).bfloat16()
    i = i._replace(ref_hidden=i.hidden, ref_weight=near)
    truth = i.to(torch.float64).call(DEFINITION, direction=("jsd", 0.5))[2]
    assert 1e-7 < truth.mean() < 1e-4
    for impl in RUNNABLE:
        ours = i.call(selected_logprob_kl, direction=("jsd", 0.5), impl=impl)[2]
        assert max_error(ours, truth) < 2e-2 * truth.mean()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_words_that_a_head_rules_out(dtype):
    """Both, the policy alone, the reference alone: m rules out what both do."""
    i = make_inputs(9, 20, 24, 16, 31, bias=True, dtype=dtype)
    i.bias[[5, 3]] = i.ref_bias[[5, 17]] = -torch.inf
    out = torch.tensor([3, 5, 17])
    i = i._replace(targets=i.targets.where(~torch.isin(i.targets, out), 0))
    options = dict(direction=("jsd", 0.3))
    truth = run(DEFINITION, i, dtype=torch.float64, **options)
    plain = run(DEFINITION, i, **options)
    for impl in RUNNABLE:
        ours = run(selected_logprob_kl, i, impl=impl, **options)
        for name, value in truth.items():
            if dtype == torch.float64:
                torch.testing.assert_close(ours[name], value, rtol=1e-13, atol=1e-14)
            else:
                assert_as_accurate(ours[name], plain[name], value, what=name)
        assert not ours["weight"][[3, 5]].any() and not ours["bias"][[3, 5]].any()


def test_the_references_own_scale_may_be_the_policys():
    i = make_inputs(37, 53, 45, 29, 101, bias=True)
    options = dict(direction=("jsd", 0.3), scale=0.7, softcap=5.0)
    own = dict(ref_scale=0.7, ref_softcap=5.0)
    one, other = (run(selected_logprob_kl, i, **options, **more) for more in ({}, own))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("schedule", ["save", "frozen_head"])
def test_operator_registration(schedule):
    fwd, bwd = torch.ops.sepo.selected_logprob_kl_fwd, torch.ops.sepo.selected_logprob_kl_bwd
    i = make_inputs(8, 5, 16, 12, 31, bias=True)
    args = (*i[:6], i.rows, i.targets)
    settings = (0.5, 4.0, 2.0, None, 0.3, schedule, 2 * 31 * 14)
    torch.library.opcheck(fwd.default, (*args, *settings, "chunked"))
    found = fwd(*args, *settings, "chunked")
    need = (True, schedule != "frozen_head", schedule != "frozen_head")
    args = (*i.upstream, *args, *found, *settings, *need, "chunked")
    torch.library.opcheck(bwd.default, args)


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_compiles_as_one_node():
    i = make_inputs(37, 23, 45, 29, 101, bias=True)
    options = dict(softcap=3.0, direction=("jsd", 0.3))
    torch._dynamo.reset()
    compiled = torch.compile(selected_logprob_kl, fullgraph=True, backend="aot_eager")
    eager, traced = (run(fn, i, **options) for fn in (selected_logprob_kl, compiled))
    assert all(torch.equal(traced[name], eager[name]) for name in eager)


def counted_flops(i, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        _, _, kl = i.call(selected_logprob_kl, **options)
        if kl.requires_grad:
            kl.sum().backward()
    return counter.get_total_flops()


def test_costs_the_gemms_and_memory_of_a_kl():
    i = make_inputs(37, 23, 45, 29, 101)
    for leaves, budget in ((0, None), (1, None), (1, 12120), (2, None), (2, 12120)):
        for x in i[:leaves]:
            x.requires_grad_()
        both = [dict(direction=d, budget=budget) for d in ("ref||policy", ("jsd", 0.3))]
        kl, jsd = (i.call(explain_selected_logprob_kl, **one, impl="chunked") for one in both)
        assert kl == jsd
        kl, jsd = (counted_flops(i, **one) for one in both)
        assert kl == jsd


REFUSALS = {
    **{str(beta): (("jsd", beta), rf"0 < beta < 1 in direction \(.jsd., beta\), got {beta}")
       for beta in (0, 1, 0.0, 1.0, -0.5, 1.5, math.inf, math.nan, True)},
    "text": (("jsd", "0.5"), "0 < beta < 1 .*got '0.5'"),
    "no beta": ("jsd", r'or \("jsd", beta\), got "jsd"'),
    "two betas": (("jsd", 0.5, 0.5), r"got \('jsd', 0.5, 0.5\)"),
    "another": (("js", 0.5), r"got \('js', 0.5\)"),
    "a list": (["jsd", 0.5], r"got \['jsd', 0.5\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("fn", [selected_logprob_kl, explain_selected_logprob_kl])
def test_refuses_by_name(case, fn):
    direction, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as error:
        make_inputs(4, 2, 8, 6, 16).call(fn, direction=direction)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tiles", [False, True])
def test_logits_are_read_once_more_by_rows(monkeypatch, tiles):
    """With bfloat16 tiles too: they make the logits, but do not keep them in cache."""
    monkeypatch.setattr(extension, "BFLOAT16_TILES", tiles)
    i = make_inputs(4, 2, 8, 6, 16, dtype=torch.bfloat16)
    explain = partial(i.call, explain_selected_logprob_kl)
    jsd, kl = explain(direction=("jsd", 0.5)), explain(direction="ref||policy")
    assert jsd.impl == kl.impl == RUNNABLE[0]
    assert not any("stay in cache" in reason for reason in jsd.reasons)
    assert any("stay in cache" in reason for reason in kl.reasons) == (
        tiles and kl.impl == "native"
    )
