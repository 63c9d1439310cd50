"""The reference's head has a scale and a soft cap of its own; without, it has the policy's."""

import pytest
import torch
from numerics import assert_as_accurate
from ops import implementations
from ops.kl_cases import DIRECTIONS, SCHEDULES, budget_for, checked, make_inputs, run
from ops.scale_cases import M, Two, spread

from sepo.ops import selected_logprob, selected_logprob_kl
from sepo_kernels.selected_logprob_kl import IMPLS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
impl = implementations.fixture(IMPLS)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_policys_settings_by_name_are_the_default_bit_for_bit(impl, schedule, dtype, direction):
    i = make_inputs(37, 23, 45, 29, 101, bias=True, dtype=dtype)
    options = dict(schedule=schedule, budget=budget_for(schedule, 101, dtype), impl=impl)
    options |= dict(direction=direction, scale=0.7, softcap=3.0)
    default = run(checked(schedule, 23), i, **options)
    named = run(selected_logprob_kl, i, ref_scale=0.7, ref_softcap=3.0, **options)
    assert all(torch.equal(named[name], default[name]) for name in default)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scale_of_two_is_twice_the_weight(impl, schedule, dtype):
    """A power of two rounds nothing: the same bits, of every number."""
    i = make_inputs(37, 23, 45, 29, 101, dtype=dtype)
    options = dict(schedule=schedule, budget=budget_for(schedule, 101, dtype), impl=impl)
    scaled = run(selected_logprob_kl, i, scale=0.5, ref_scale=2.0, **options)
    twice = i._replace(ref_weight=i.ref_weight * 4)
    weighed = run(selected_logprob_kl, twice, scale=0.5, **options)
    assert all(torch.equal(scaled[name], weighed[name]) for name in scaled)


SETTINGS = {
    "both": (dict(scale=0.7, softcap=3.0), dict(scale=1.3, softcap=8.0)),
    "the policy alone": (dict(softcap=3.0), dict(softcap=None)),
    "the reference alone": (dict(softcap=None), dict(softcap=3.0)),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_log_probability_is_that_of_its_own_head(impl, dtype, name):
    own, other = SETTINGS[name]
    i = make_inputs(37, 53, 45, 29, 1001, bias=True, dtype=dtype)
    of_reference = {f"ref_{k}": torch.inf if x is None else x for k, x in other.items()}
    logp, ref_logp, _ = i.call(selected_logprob_kl, impl=impl, **own, **of_reference)
    policy = selected_logprob(i.hidden, i.weight, i.rows, i.targets, bias=i.bias, **own)
    reference = selected_logprob(
        i.ref_hidden, i.ref_weight, i.rows, i.targets, bias=i.ref_bias, **other
    )
    torch.testing.assert_close(logp, policy, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(ref_logp, reference, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_divergence_is_of_the_two_settings(impl, direction):
    """Of two softmaxes by torch's own divergence; the gradient by its autograd."""
    i = make_inputs(37, 53, 45, 29, 101, bias=True, dtype=torch.float64)
    i.hidden.requires_grad_()
    capped = lambda x, c: c * torch.tanh(x / c)
    a = capped(0.7 * i.hidden[i.rows] @ i.weight.T + i.bias, 3.0)
    b = capped(1.3 * i.ref_hidden[i.rows] @ i.ref_weight.T + i.ref_bias, 8.0)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    first, second = (log_p, log_q) if direction == "policy||ref" else (log_q, log_p)
    kl = torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1)
    options = dict(scale=0.7, softcap=3.0, ref_scale=1.3, ref_softcap=8.0, impl=impl)
    ours = i.call(selected_logprob_kl, direction=direction, **options).kl
    torch.testing.assert_close(ours, kl, rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(x @ i.upstream[1].double(), i.hidden)[0] for x in (ours, kl)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", Two.schedules)
def test_equal_scales_of_the_reference_give_the_bits_of_one(impl, schedule, dtype):
    inputs, options = Two.inputs(dtype), dict(budget=Two.budget(schedule, dtype, impl), impl=impl)
    each = torch.full((M,), 0.7, dtype=torch.promote_types(dtype, torch.float32))
    call = lambda scale: Two.run(
        Two.fn, inputs, schedule, dtype, scale=1.5, ref_scale=scale, **options
    )
    one, found = call(0.7), call(each)
    assert all(torch.equal(found[name], one[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", Two.schedules)
@pytest.mark.parametrize("scale", ["a number", "one a row"])
def test_a_scale_a_row_of_the_reference(impl, schedule, dtype, scale):
    inputs, each = Two.inputs(dtype, 40), spread(dtype)[:40]
    own = 0.8 if scale == "a number" else each.flip(0)
    exact = lambda x: x.double() if isinstance(x, torch.Tensor) else x
    options = dict(softcap=3.0, ref_softcap=5.0)
    few = dict(budget=Two.budget(schedule, dtype, impl), impl=impl)
    call = lambda fn, dtype, scale, ref, **more: Two.run(
        fn, inputs, schedule, dtype, scale=scale, ref_scale=ref, **options, **more
    )
    ours = call(Two.fn, dtype, own, each, **few)
    truth = call(Two.reference, torch.float64, exact(own), each.double())
    plain = call(Two.reference, dtype, own, each)
    for name, value in truth.items():
        if dtype == torch.float64:
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-13, msg=name)
        else:
            assert_as_accurate(ours[name], plain[name], value, what=name)


REFUSALS = {
    "length": (torch.ones(M - 1), r"expected ref_scale a number, or \(70,\) torch.float32, got"),
    "gradient": (torch.ones(M).requires_grad_(), "expected ref_scale without a gradient, got one"),
    "zero": (
        torch.ones(M).index_fill_(0, torch.tensor(5), 0.0),
        "expected ref_scale > 0 in every row, got 0.0",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_by_name(case):
    scale, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        Two.run(Two.fn, Two.inputs(torch.bfloat16), "save", torch.bfloat16, ref_scale=scale)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("schedule", Two.schedules)
def test_a_scale_a_row_compiles_as_one_node(impl, schedule):
    inputs, each = Two.inputs(torch.float32), spread(torch.float32)
    options = dict(budget=Two.budget(schedule, torch.float32, impl), impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(Two.fn, fullgraph=True, backend="aot_eager")
    eager, found = (
        Two.run(fn, inputs, schedule, torch.float32, scale=0.7, ref_scale=each, **options)
        for fn in (Two.fn, compiled)
    )
    assert all(torch.equal(found[name], eager[name]) for name in eager)
