"""The operator boundary of selected_stats: registration, compilation, refusals, explanations."""

import pytest
import torch
from ops import implementations
from ops.stats_cases import VALUES, WAYS, budget_for, entropy_layout, make_inputs, ours, run

from sepo.ops import SelectedStats, explain_selected_stats, selected_logprob, selected_stats
from sepo_kernels.selected_stats import IMPLS

FWD = torch.ops.sepo.selected_stats_fwd.default
BWD = torch.ops.sepo.selected_stats_bwd.default


impl = implementations.fixture(IMPLS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_operator_registration(impl, way, dtype):
    hidden, weight, bias, rows, targets, up = make_inputs(8, 20, 16, 31, bias=True, dtype=dtype)
    weight = weight.T.contiguous().T  # a fake kernel must know the strides too
    head, (schedule, _, entropy_grad) = (hidden, weight, bias, rows, targets), WAYS[way]
    scales = torch.linspace(0.5, 2, 20)
    args = (*head, 1.0, 4.0, entropy_grad, schedule, 5 * 31 * 10, impl)
    torch.library.opcheck(FWD, args, dict(scales=scales))
    if not entropy_grad:
        return
    logp, lse, row_scale, entropy, *_, reference, _, saved = FWD(*args, scales=scales)
    found = logp, lse, entropy, reference, row_scale, saved
    for need in [(True, False, False), (True, True, True), (False, True, False)]:
        args = (up, up, *head, *found, 1.0, 4.0, schedule, 5 * 31 * 10, *need, impl)
        torch.library.opcheck(BWD, args, dict(scales=scales))


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
DYNAMO_WARNS = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated.*:DeprecationWarning"
)


@DYNAMO_WARNS
@pytest.mark.parametrize("way", WAYS)
def test_compiles_as_one_node(impl, way):
    inputs = make_inputs(37, 23, 45, 101, bias=True)
    entropy_grad = WAYS[way].entropy_grad
    budget = budget_for(way, 101, softcap=3.0, impl=impl)
    options = dict(budget=budget, impl=impl, softcap=3.0, entropy_grad=entropy_grad, way=way)
    torch._dynamo.reset()
    eager = run(selected_stats, inputs, dtype=torch.float32, **options)
    compiled = torch.compile(selected_stats, fullgraph=True, backend="aot_eager")
    found = run(compiled, inputs, dtype=torch.float32, **options)
    assert all(torch.equal(found[name], eager[name]) for name in eager)


@DYNAMO_WARNS
def test_results_have_their_names_when_compiled():
    hidden, weight, _, rows, targets, _ = make_inputs(37, 23, 45, 101)
    torch._dynamo.reset()
    compiled = torch.compile(selected_stats, fullgraph=True, backend="aot_eager")
    for grad in (False, True):
        found = compiled(hidden.requires_grad_(grad), weight, rows, targets)
        assert type(found) is SelectedStats
        assert [x.dtype for x in found] == [torch.float32] * 5 + [torch.bool]
        assert all(x.shape == (23,) for x in found)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_runs_on_fake_tensors(entropy_grad):
    with torch._subclasses.FakeTensorMode():
        hidden = torch.empty(8, 16, requires_grad=True)
        weight = torch.empty(31, 16, requires_grad=True)
        rows, targets = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
        found = selected_stats(hidden, weight, rows, targets, entropy_grad=entropy_grad)
        (found.logp + found.entropy).sum().backward()
        assert all(x.shape == (5,) for x in found)
        assert hidden.grad.shape == (8, 16) and weight.grad.shape == (31, 16)


REFUSALS = {
    "width": (dict(weight=torch.zeros(16, 9)), r"got \(4, 8\) and \(16, 9\)"),
    "rows dtype": (dict(rows=torch.zeros(2)), "int32 or int64 rows.*got torch.float32"),
    "softcap": (dict(softcap=0.0), "softcap > 0 or None, got 0.0"),
    "scale": (dict(scale=torch.ones(3)), r"a number, or \(2,\) torch.float32, got \(3,\)"),
    "budget": (dict(budget=63), "at least one row, 64 bytes, got 63"),
    "implementation": (dict(impl="fast"), 'unknown impl "fast", expected one of: auto, .*chunked'),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("fn", [selected_stats, explain_selected_stats])
def test_refuses_by_name(case, fn):
    wrong, message = REFUSALS[case]
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16)
    args = dict(hidden=hidden, weight=weight, rows=rows, targets=targets) | wrong
    with pytest.raises(ValueError, match=message):
        fn(**args)


def test_a_loss_of_a_metric_is_an_error():
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16)
    found = selected_stats(hidden.requires_grad_(), weight, rows, targets)
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.entropy.sum().backward()


def test_explanations_name_schedule_and_reason():
    M, V = 23, 101
    hidden, weight, _, rows, targets, _ = make_inputs(37, M, 45, V)
    explain = lambda entropy=True, **k: explain_selected_stats(
        hidden, weight, rows, targets, entropy_grad=entropy, **k
    )
    assert (explain().schedule, explain().gemms) == ("no_grad", 1)
    hidden.requires_grad_()
    assert (explain(False).schedule, explain(False).gemms) == ("frozen_head", 2)
    frozen = explain()
    assert (frozen.schedule, frozen.gemms, frozen.saved) == ("save", 2, M)
    assert frozen.reasons[1] == "the head needs no gradient"
    # the logits, and all columns of their gradient
    assert frozen.peak_bytes == 2 * M * V * 4
    assert (
        f"logits (M, V) = ({M}, {V}) in torch.float32 take {M * V * 4} bytes" in frozen.reasons[0]
    )
    small = explain(budget=10 * 4 * V)
    assert (small.schedule, small.gemms) == ("recompute", 3)
    weight.requires_grad_()
    assert (explain().schedule, explain().gemms) == ("save", 3)
    small = explain(budget=10 * 4 * V)
    # 23 rows in three even chunks rather than 10, 10 and 3
    assert small[1:6] == ("recompute", 8, 8, 8 * 4 * V, 4)
    assert f"saving takes {2 * M * V * 4} bytes, budget {10 * 4 * V}" in small.reasons[0]


def test_a_metric_is_scheduled_as_the_log_probability():
    from sepo.ops import explain_selected_logprob

    hidden, weight, _, rows, targets, _ = make_inputs(37, 23, 45, 101, dtype=torch.bfloat16)
    for grad in ("", "hidden", "hidden weight"):
        for name, x in (("hidden", hidden), ("weight", weight)):
            x.requires_grad_(name in grad.split())
        for budget in (None, 8000, 4000):
            args = (hidden, weight, rows, targets)
            one = explain_selected_logprob(*args, budget=budget, impl="chunked")
            assert explain_selected_stats(*args, budget=budget, impl="chunked") == one


def test_a_row_of_a_differentiable_entropy_keeps_its_logits_in_float32():
    V = 50257
    layout = entropy_layout(V, torch.bfloat16, "chunked")
    assert layout.saved_bytes == 4 * V and layout.gradient_bytes == 2 * 4096
    assert layout.row_bytes(gradient=True) == 6 * V and layout.row_bytes(gradient=False) == 4 * V


def test_autocast_and_names(impl):
    """The named results are those of the definition, in its order."""
    inputs = make_inputs(37, 23, 45, 101)
    found = ours(inputs, dtype=torch.float32, way="no_grad", impl=impl)
    hidden, weight, _, rows, targets, _ = inputs
    assert tuple(found) == VALUES == SelectedStats._fields
    assert torch.equal(found["logp"], selected_logprob(hidden, weight, rows, targets, impl=impl))
