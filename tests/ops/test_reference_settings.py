"""The reference's head has a scale and a soft cap of its own; without, it has the policy's."""

import pytest
import torch
from ops import implementations
from ops.kl_cases import DIRECTIONS, SCHEDULES, budget_for, checked, make_inputs, run

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
