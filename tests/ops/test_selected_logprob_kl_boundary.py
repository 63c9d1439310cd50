"""The operator boundary: registration, compilation, autocast, explanations, refusals."""

import pytest
import torch
from ops import implementations
from ops.kl_cases import DIRECTIONS, SCHEDULES, budget_for, make_inputs, run

from sepo.ops import explain_selected_logprob_kl, selected_logprob_kl
from sepo_kernels.selected_logprob_kl import IMPLS
from sepo_kernels.selected_logprob_kl.layout import POLICY_REF

FWD = torch.ops.sepo.selected_logprob_kl_fwd.default
BWD = torch.ops.sepo.selected_logprob_kl_bwd.default


impl = implementations.fixture(IMPLS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["save", "recompute", "frozen_head", "no_grad"])
def test_operator_registration(impl, schedule, dtype):
    i = make_inputs(8, 5, 16, 12, 31, bias=True, dtype=dtype)
    heads, indices = i[:6], (i.rows, i.targets)
    settings = (0.5, 4.0, 2.0, None, POLICY_REF, schedule, 2 * 31 * 14)
    torch.library.opcheck(FWD, (*heads, *indices, *settings, impl))
    if schedule != "no_grad":
        found = FWD(*heads, *indices, *settings, impl)
        if schedule != "recompute":
            heads = (*i[:3], None, None, None)
        frozen = schedule == "frozen_head"
        needs = [(True, False, False), (True, True, True), (False, True, False)]
        for need in needs[: 1 if frozen else 3]:
            args = (*i.upstream, *heads, *indices, *found, *settings, *need, impl)
            torch.library.opcheck(BWD, args)


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
DYNAMO_WARNS = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated.*:DeprecationWarning"
)


@DYNAMO_WARNS
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_compiles_as_one_node(impl, schedule):
    i = make_inputs(37, 23, 45, 29, 101, bias=True)
    options = dict(budget=budget_for(schedule, 101), impl=impl, softcap=3.0, schedule=schedule)
    torch._dynamo.reset()
    compiled = torch.compile(selected_logprob_kl, fullgraph=True, backend="aot_eager")
    eager, traced = (run(fn, i, **options) for fn in (selected_logprob_kl, compiled))
    assert all(torch.equal(traced[name], eager[name]) for name in eager)


def test_compiles_once_for_any_number_of_rows(impl):
    """M and N change with every packed batch: one graph must serve them."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(selected_logprob_kl, fullgraph=True, backend=backend, dynamic=True)
    for N, M in ((37, 23), (41, 30), (20, 64)):
        i = make_inputs(N, M, 16, 12, 31)
        with torch.no_grad():
            found = i.call(compiled, impl=impl)
            eager = i.call(selected_logprob_kl, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_runs_on_fake_tensors(impl, direction):
    with torch._subclasses.FakeTensorMode():
        hidden, ref_hidden = torch.empty(8, 16, requires_grad=True), torch.empty(8, 12)
        weight, ref_weight = torch.empty(31, 16, requires_grad=True), torch.empty(31, 12)
        rows, targets = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
        logp, _, kl = selected_logprob_kl(
            hidden, weight, ref_hidden, ref_weight, rows, targets, direction=direction, impl=impl
        )
        (logp.sum() + kl.sum()).backward()
        assert logp.shape == kl.shape == (5,) and hidden.grad.shape == (8, 16)
        assert weight.grad.shape == (31, 16)


def test_cannot_be_differentiated_twice():
    i = make_inputs(4, 2, 8, 6, 16)
    i.hidden.requires_grad_()
    kl = i.call(selected_logprob_kl)[2]
    upstream = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(kl, i.hidden, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_autocast_does_not_reach_inside(impl, direction):
    i = make_inputs(37, 23, 45, 29, 101, bias=True)
    options = dict(direction=direction, impl=impl)
    outside = run(selected_logprob_kl, i, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(selected_logprob_kl, i, **options)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_explanations_name_schedule_and_reason():
    i = make_inputs(37, 23, 45, 29, 101)
    explain = lambda **k: i.call(explain_selected_logprob_kl, impl="chunked", **k)[1:]
    default = "budget 1073741824 bytes, the default of a CPU"
    assert explain() == (
        "no_grad", 23, 0, 23 * 8 * 101, 2, 0, 1 << 30,
        ("nothing needs a gradient, or no_grad", default),
    )  # fmt: skip
    i.hidden.requires_grad_()
    # two blocks that are the logits' scratch too, and the gradient's buffer
    assert explain()[:5] == ("save", 23, 0, 23 * 12 * 101, 3)
    assert "the head needs no gradient" in explain()[-1]
    small = explain(budget=10 * 12 * 101)
    # 23 rows in three even chunks rather than 10, 10 and 3
    assert small[:5] == ("frozen_head", 8, 0, 8 * 12 * 101, 4)
    assert "saving takes 27876 bytes, budget 12120: both directions" in small[-1][0]
    i.weight.requires_grad_()
    assert explain()[:5] == ("save", 23, 0, 23 * 12 * 101, 4)
    small = explain(budget=10 * 12 * 101)
    # the forward keeps nothing and makes no gradient: it takes more rows at once
    assert small[:5] == ("recompute", 12, 8, 8 * 12 * 101, 6)
    assert small[-1] == (
        "saving takes 27876 bytes, budget 12120: the logits are computed twice",
        "budget 12120 bytes, as given",
    )
    with torch.no_grad():
        assert explain()[0] == "no_grad"
    i.hidden.requires_grad_(False)
    assert explain()[4] == 3 and "hidden needs no gradient" in explain()[-1][1]


REFUSALS = {
    "rank": (dict(hidden=torch.zeros(1, 4, 8)), r"hidden \(N, D\).*got \(1, 4, 8\) and \(16, 8\)"),
    "width": (dict(weight=torch.zeros(16, 9)), r"got \(4, 8\) and \(16, 9\)"),
    "reference's rank": (
        dict(ref_weight=torch.zeros(16)),
        r"ref_hidden \(N, D\) and ref_weight \(V, D\), got \(4, 6\) and \(16,\)",
    ),
    "reference's width": (dict(ref_weight=torch.zeros(16, 8)), r"got \(4, 6\) and \(16, 8\)"),
    "reference's rows": (
        dict(ref_hidden=torch.zeros(5, 6)),
        r"N = 4 and V = 16, got \(5, 6\) and \(16, 6\)",
    ),
    "vocabularies": (
        dict(ref_weight=torch.zeros(17, 6)),
        r"N = 4 and V = 16, got \(4, 6\) and \(17, 6\)",
    ),
    "integers": (
        dict(hidden=torch.zeros(4, 8, dtype=torch.int64)),
        "floating-point hidden, got torch.int64",
    ),
    "dtypes": (
        dict(weight=torch.zeros(16, 8).bfloat16()),
        "hidden torch.float32, weight torch.bfloat16",
    ),
    "reference's dtype": (
        dict(ref_hidden=torch.zeros(4, 6).half(), ref_weight=torch.zeros(16, 6).half()),
        "ref_hidden in torch.float32, got torch.float16",
    ),
    "reference's dtypes": (
        dict(ref_weight=torch.zeros(16, 6).half()),
        "ref_hidden torch.float32, ref_weight torch.float16",
    ),
    "columns of a wider buffer": (
        dict(ref_hidden=torch.zeros(6, 4).T),
        r"ref_hidden with contiguous rows, got strides \(1, 4\)",
    ),
    "bias shape": (dict(bias=torch.zeros(15)), r"expected bias \(16,\) .*got \(15,\)"),
    "bias dtype": (dict(bias=torch.zeros(16).half()), r"float32, got \(16,\) torch.float16"),
    "reference's bias": (dict(ref_bias=torch.zeros(15)), r"expected ref_bias \(16,\)"),
    "rows shape": (dict(rows=torch.zeros(3, dtype=torch.int32)), r"got \(3,\) and \(2,\)"),
    "rows dtype": (dict(rows=torch.zeros(2)), "int32 or int64 rows.*got torch.float32"),
    "targets dtype": (
        dict(targets=torch.zeros(2, dtype=torch.int32)),
        "int64 targets, got torch.int32 and torch.int32",
    ),
    "device": (dict(ref_weight=torch.zeros(16, 6, device="meta")), "one device, got meta and cpu"),
    "softcap": (dict(softcap=0.0), "expected softcap > 0 or None, got 0.0"),
    "reference's softcap": (dict(ref_softcap=-1.0), "expected ref_softcap > 0 or None, got -1.0"),
    "scale": (dict(scale=0.0), "a scale other than 0, got 0.0"),
    "reference's scale": (dict(ref_scale=0.0), "a ref_scale above 0 or None, got 0.0"),
    "reference's negative scale": (dict(ref_scale=-0.5), "a ref_scale above 0 or None, got -0.5"),
    "reference's infinite scale": (
        dict(ref_scale=torch.inf),
        "a ref_scale above 0 or None, got inf",
    ),
    "direction": (
        dict(direction="policy|ref"),
        r'direction "ref\|\|policy", "policy\|\|ref" or \("jsd", beta\), got "policy\|ref"',
    ),
    "budget": (dict(budget=127), "at least one row, 128 bytes, got 127"),
    "implementation": (dict(impl="fast"), 'unknown impl "fast", expected one of: auto, .*chunked'),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("fn", [selected_logprob_kl, explain_selected_logprob_kl])
def test_refuses_by_name(case, fn):
    wrong, message = REFUSALS[case]
    i = make_inputs(4, 2, 8, 6, 16)
    names = ("hidden", "weight", "ref_hidden", "ref_weight", "rows", "targets")
    args = {name: getattr(i, name) for name in names} | wrong
    with pytest.raises(ValueError, match=message):
        fn(**args)


def test_one_row_of_a_gradient_takes_more_than_one_of_a_score():
    i = make_inputs(4, 2, 8, 6, 16, dtype=torch.bfloat16)
    i.call(selected_logprob_kl, budget=128, impl="chunked")
    i.hidden.requires_grad_()
    with pytest.raises(ValueError, match="at least one row, 224 bytes, got 128"):
        i.call(selected_logprob_kl, budget=128, impl="chunked")
