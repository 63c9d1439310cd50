"""The operator boundary: registration, compilation, choice of implementation, refusals."""

import pytest
import torch
from ops import implementations
from ops.logprob_cases import SCHEDULES, budget_for, make_inputs, run

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels.registry import Impl, always, pick
from sepo_kernels.selected_logprob import IMPLS

FWD = torch.ops.sepo.selected_logprob_fwd.default
BWD = torch.ops.sepo.selected_logprob_bwd.default


impl = implementations.fixture(IMPLS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_operator_registration(impl, schedule, dtype):
    hidden, weight, bias, rows, targets, up = make_inputs(8, 5, 16, 31, bias=True, dtype=dtype)
    weight = weight.T.contiguous().T  # a fake kernel must know the strides too
    head = (hidden, weight, bias, rows, targets)
    settings = (0.5, 4.0, schedule, 2 * 31 * 10)
    torch.library.opcheck(FWD, (*head, *settings, impl))
    if schedule != "no_grad":
        logp, lse, row_scale, saved = FWD(*head, *settings, impl)
        frozen = schedule == "frozen_head"
        needs = [(True, False, False), (True, True, True), (False, True, False)][
            : 1 if frozen else 3
        ]
        for need in needs:
            torch.library.opcheck(
                BWD, (up, *head, logp, lse, row_scale, saved, *settings, *need, impl)
            )


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
DYNAMO_WARNS = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated.*:DeprecationWarning"
)


@DYNAMO_WARNS
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_compiles_as_one_node(impl, schedule):
    inputs = make_inputs(37, 23, 45, 101, bias=True)
    budget = budget_for(schedule, 101, softcap=3.0, impl=impl)
    options = dict(budget=budget, impl=impl, softcap=3.0)
    torch._dynamo.reset()
    eager = run(selected_logprob, inputs, dtype=torch.float32, schedule=schedule, **options)
    compiled = run(
        torch.compile(selected_logprob, fullgraph=True, backend="aot_eager"),
        inputs, dtype=torch.float32, schedule=schedule, **options,
    )  # fmt: skip
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_compiles_once_for_any_number_of_rows(impl):
    """M and N change with every packed batch: one graph must serve them."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(selected_logprob, fullgraph=True, backend=backend, dynamic=True)
    for N, M in ((37, 23), (41, 30), (20, 64)):
        hidden, weight, _, rows, targets, _ = make_inputs(N, M, 16, 31)
        with torch.no_grad():
            logp = compiled(hidden, weight, rows, targets, impl=impl)
            assert torch.equal(logp, selected_logprob(hidden, weight, rows, targets, impl=impl))
    assert len(graphs) == 1


def test_runs_on_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        hidden = torch.empty(8, 16, requires_grad=True)
        weight = torch.empty(31, 16, requires_grad=True)
        rows, targets = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
        logp = selected_logprob(hidden, weight, rows, targets)
        logp.sum().backward()
        assert logp.shape == (5,) and hidden.grad.shape == (8, 16)
        assert weight.grad.shape == (31, 16)


def refuse(name, fwd=None):
    return Impl(name, fwd, None, why_not=lambda *tensors: f"{name} says no")


def test_auto_takes_the_first_that_can_run():
    good = Impl("good", None, None, why_not=always)
    assert pick((refuse("a"), good, refuse("b")), "auto") is good
    with pytest.raises(ValueError, match="no implementation can run these tensors.*a says no"):
        pick((refuse("a"),), "auto")


def test_a_named_implementation_never_falls_back():
    good = Impl("good", None, None, why_not=always)
    with pytest.raises(ValueError, match='impl="a" cannot run here: a says no'):
        pick((refuse("a"), good), "a")


def test_unknown_implementation_lists_the_known():
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16)
    with pytest.raises(ValueError, match='unknown impl "fast", expected one of: auto, .*chunked'):
        selected_logprob(hidden, weight, rows, targets, impl="fast")


REFUSALS = {
    "rank": (dict(hidden=torch.zeros(1, 4, 8)), r"hidden \(N, D\).*got \(1, 4, 8\) and \(16, 8\)"),
    "width": (dict(weight=torch.zeros(16, 9)), r"got \(4, 8\) and \(16, 9\)"),
    "integers": (
        dict(hidden=torch.zeros(4, 8, dtype=torch.int64)),
        "floating-point hidden, got torch.int64",
    ),
    "dtypes": (
        dict(weight=torch.zeros(16, 8).bfloat16()),
        "hidden torch.float32, weight torch.bfloat16",
    ),
    "bias shape": (dict(bias=torch.zeros(15)), r"expected bias \(16,\) .*got \(15,\)"),
    "bias dtype": (dict(bias=torch.zeros(16).half()), r"float32, got \(16,\) torch.float16"),
    "rows shape": (dict(rows=torch.zeros(3, dtype=torch.int32)), r"got \(3,\) and \(2,\)"),
    "rows dtype": (dict(rows=torch.zeros(2)), "int32 or int64 rows.*got torch.float32"),
    "targets dtype": (
        dict(targets=torch.zeros(2, dtype=torch.int32)),
        "int64 targets, got torch.int32 and torch.int32",
    ),
    "device": (dict(weight=torch.zeros(16, 8, device="meta")), "one device, got meta and cpu"),
    "softcap": (dict(softcap=0.0), "softcap > 0 or None, got 0.0"),
    "budget": (dict(budget=63), "at least one row, 64 bytes, got 63"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("fn", [selected_logprob, explain_selected_logprob])
def test_refuses_by_name(case, fn):
    wrong, message = REFUSALS[case]
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16)
    args = dict(hidden=hidden, weight=weight, rows=rows, targets=targets) | wrong
    with pytest.raises(ValueError, match=message):
        fn(**args)


def test_one_row_of_a_gradient_takes_more_than_one_of_a_score():
    hidden, weight, _, rows, targets, _ = make_inputs(4, 2, 8, 16, dtype=torch.bfloat16)
    options = dict(budget=64, impl="chunked")
    selected_logprob(hidden, weight, rows, targets, **options)
    with pytest.raises(ValueError, match="at least one row, 96 bytes, got 64"):
        selected_logprob(hidden.requires_grad_(), weight, rows, targets, **options)
