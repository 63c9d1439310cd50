"""K targets a row: the right function, its derivative, and the rules of absent and repeated ones."""

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops import implementations
from ops.k_target_cases import LARGE, OVER, SHAPES, dense, make_inputs, ours, run
from ops.logprob_cases import SCHEDULES, VARIANTS

from sepo.ops import explain_selected_logprob, selected_logprob
from sepo_kernels.target_logits import IMPLS, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
impl = implementations.fixture(IMPLS)


def both(shape, variant, over, schedule, dtype, impl):
    """(ours, plain PyTorch in dtype, truth in float64) from the same inputs, rounded to dtype."""
    options = dict(VARIANTS[variant])
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    options |= dict(over=over, schedule=schedule)
    truth, plain = (run(dense, inputs, dtype=d, **options) for d in (torch.float64, dtype))
    return ours(inputs, impl=impl, dtype=dtype, **options), plain, truth


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_formula_in_float64(impl, shape, variant, over, schedule):
    found, _, truth = both(shape, variant, over, schedule, torch.float64, impl)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("shape", [*SHAPES[:3], LARGE], ids=str)
def test_as_accurate_as_plain_pytorch(impl, shape, variant, over, dtype):
    # over the vocabulary the sum S of a row's gradients comes to its best target b in two parts,
    # S (1 - p_b) and G_b - S: in float32 that is a rounding more. 16 bits do not see it
    factor = 4 if over == "vocabulary" and dtype == torch.float32 else 2
    for schedule in SCHEDULES:
        found, plain, truth = both(shape, variant, over, schedule, dtype, impl)
        assert found["logp"].dtype == torch.float32
        for name, value in truth.items():
            what = f"{schedule} {name}"
            assert_as_accurate(found[name], plain[name], value, what=what, factor=factor)
        # from logits that were never rounded to 16 bits
        assert max_error(found["logp"], truth["logp"]) < 2e-5


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_definition_is_the_dense_formulas_logits(bias, softcap):
    inputs = make_inputs(*SHAPES[1], dtype=torch.float64, bias=bias)
    hidden, weight, offset, rows, targets, _ = inputs
    options = dict(bias=offset, scale=0.7, softcap=softcap)
    z = reference.target_logits(hidden, weight, rows, targets, **options)
    assert torch.equal(z == -torch.inf, targets < 0)
    logp = z.log_softmax(-1).masked_fill(targets < 0, 0)
    torch.testing.assert_close(
        logp, dense(hidden, weight, rows, targets, over="targets", **options)
    )


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_target_in_a_column_is_bit_for_bit_one_target(impl, schedule, dtype):
    *head, rows, targets, up = make_inputs(*SHAPES[1], dtype=dtype, bias=True)
    targets, up = targets.amax(1, keepdim=True), up[:, :1]
    options = dict(impl=impl, schedule=schedule, dtype=dtype, softcap=5.0)
    column = ours((*head, rows, targets, up), **options)
    plain = ours((*head, rows, targets[:, 0], up[:, 0]), **options)
    assert column["logp"].shape == targets.shape
    column["logp"] = column["logp"][:, 0]
    assert column.keys() == plain.keys()
    assert all(torch.equal(column[name], plain[name]) for name in plain)


def test_what_occurs_twice_has_two_results_whose_gradients_add(impl):
    *head, rows, targets, up = make_inputs(*SHAPES[1], dtype=torch.float64, bias=True)
    targets = targets.amax(1, keepdim=True)
    twice = ours((*head, rows, targets.repeat(1, 2), up[:, :2]), impl=impl, dtype=torch.float64)
    once = ours((*head, rows, targets, up[:, :2].sum(1, True)), impl=impl, dtype=torch.float64)
    torch.testing.assert_close(twice.pop("logp"), once.pop("logp").repeat(1, 2))
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, msg=name)


def test_over_the_targets_each_column_counts(impl):
    hidden, weight, _, rows, _, _ = make_inputs(*SHAPES[0])
    targets = torch.tensor([[5, 5, -1, 5, 5]]).repeat(len(rows), 1)
    logp = selected_logprob(hidden, weight, rows, targets, over="targets", impl=impl)
    expected = torch.tensor([-1, -1, 0, -1, -1]) * torch.tensor(4.0).log()
    torch.testing.assert_close(logp, expected.expand_as(logp))


def test_over_all_targets_is_over_the_vocabulary(impl):
    N, M, D, V = 7, 23, 45, 101
    *head, rows, _, _ = make_inputs(N, M, D, V, 1, dtype=torch.float64, bias=True)
    g = torch.Generator().manual_seed(3)
    targets = torch.stack([torch.randperm(V, generator=g) for _ in range(M)])
    inputs = (*head, rows, targets, torch.randn(M, V, generator=g))
    a, b = (ours(inputs, impl=impl, dtype=torch.float64, softcap=4.0, over=over) for over in OVER)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("over", OVER)
def test_an_absent_target_has_no_part(impl, over):
    """The same bits as without its column, and NaN that arrive for it stay there."""
    *head, rows, targets, up = make_inputs(*SHAPES[1], bias=True)
    targets = targets.clamp(min=0)
    options = dict(impl=impl, over=over, softcap=5.0)
    without = ours((*head, rows, targets, up), **options)
    column = torch.full_like(targets[:, :1], -1)
    targets = torch.cat([targets[:, :1], column, targets[:, 1:]], 1)
    up = torch.cat([up[:, :1], torch.full_like(up[:, :1], torch.nan), up[:, 1:]], 1)
    found = ours((*head, rows, targets, up), **options)
    assert torch.equal(found["logp"][:, 1], torch.zeros(len(rows)))
    found["logp"] = found["logp"][:, [0, *range(2, targets.shape[1])]]
    for name, value in without.items():
        # sums over K take other lanes
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def confident(dtype):
    """One row and three targets: the second's logit is 26, the others' are about 0."""
    weight = torch.tensor([[0.5], [26.0], [0.0], [-1.0]]) * torch.eye(4)[0]
    head = (torch.eye(4)[:1].to(dtype), weight.to(dtype).requires_grad_())
    return *head, torch.zeros(1, dtype=torch.int32), torch.tensor([[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_a_confident_row_over_the_targets_keeps_its_digits(impl, dtype):
    """1 - p is 1e-11: nothing in float32."""
    hidden, weight, rows, targets = confident(dtype)
    logp = selected_logprob(hidden, weight, rows, targets, over="targets", impl=impl)
    logp[0, 1].backward()
    z = weight.detach().double()[[0, 1, 3], 0]
    truth = -(z[[0, 2]] - z[1]).exp().sum().log1p()
    torch.testing.assert_close(logp[0, 1].double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad[1, 0].double(), -truth.expm1(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_the_best_of_a_confident_row_is_one_targets(impl, dtype):
    """To the bit, whichever column it is in; the others are as far below as their logits."""
    hidden, weight, rows, targets = confident(dtype)
    logp = selected_logprob(hidden, weight, rows, targets, impl=impl)
    (grad,) = torch.autograd.grad(logp[0, 1], weight)
    one = selected_logprob(hidden, weight, rows, targets[:, 1], impl=impl)
    (expected,) = torch.autograd.grad(one[0], weight)
    assert torch.equal(logp[:, 1], one) and torch.equal(grad, expected)
    z = weight.detach()[[0, 1, 3], 0].float()
    assert torch.equal(logp[0], one + (z - z[1]))


def test_a_targets_logit_of_minus_infinity(impl):
    """A padded vocabulary's bias: no share, and a finite gradient."""
    hidden, weight, bias, rows, targets, up = make_inputs(*SHAPES[0], bias=True)
    bias[7], targets[:, 0], targets[:, 1] = -torch.inf, 7, 8
    for over in OVER:
        inputs = (hidden, weight, bias, rows, targets, up)
        found = ours(inputs, impl=impl, over=over)
        truth = run(dense, inputs, dtype=torch.float64, over=over)
        assert (found["logp"][:, 0] == -torch.inf).all()
        for name, value in truth.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("budget", [None, 2 * 3 * 8 * 11], ids=["save", "recompute"])
def test_gradcheck(impl, over, budget):
    *head, rows, targets, _ = make_inputs(5, 7, 3, 11, 4, dtype=torch.float64, bias=True)
    for x in head:
        x.requires_grad_()
    options = dict(over=over, scale=0.8, softcap=2.5, budget=budget, impl=impl)
    op = lambda h, w, b: selected_logprob(h, w, rows, targets, bias=b, **options)
    assert torch.autograd.gradcheck(op, head)
    hidden, weight, bias = head
    frozen = lambda h: op(h, weight.detach(), bias.detach())
    assert torch.autograd.gradcheck(frozen, (hidden,))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeatable_bit_for_bit(impl, over, schedule):
    inputs = make_inputs(*SHAPES[1], bias=True)
    first, second = (ours(inputs, impl=impl, over=over, schedule=schedule) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_same_for_any_budget_up_to_the_rounding_of_sums(impl, over, dtype):
    """From one row of the head at a time to all of them."""
    N, M, D, V, K = SHAPES[1]
    inputs = make_inputs(N, M, D, V, K, bias=True, dtype=dtype)
    options = dict(dtype=dtype, over=over, softcap=9.0, impl=impl)
    whole = run(selected_logprob, inputs, **options)
    least = V * 12 if over == "vocabulary" else D * 6
    for budget in (least, 2 * D * 6 + least, 3 * K * D * 8, M * K * D * 6):
        part = run(selected_logprob, inputs, budget=max(budget, least), **options)
        for name, value in whole.items():
            limit = 4 * torch.finfo(value.dtype).eps * value.abs().max().item()
            assert max_error(part[name], value.double()) <= limit, (budget, name)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_only_what_needs_a_gradient_gets_one(impl, over, need):
    *tensors, rows, targets, up = make_inputs(*SHAPES[1], bias=True, dtype=torch.float64)
    full = run(selected_logprob, (*tensors, rows, targets, up), dtype=torch.float64, over=over)
    leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip(tensors, need, strict=True)]
    hidden, weight, bias = leaves
    logp = selected_logprob(hidden, weight, rows, targets, bias=bias, over=over, impl=impl)
    logp.backward(up.double())
    for x, n, name in zip(leaves, need, ("hidden", "weight", "bias"), strict=True):
        assert (x.grad is not None) == bool(n)
        if n:
            torch.testing.assert_close(x.grad, full[name], rtol=1e-12, atol=1e-13)


def test_a_frozen_head_takes_the_products_of_one_target(impl):
    """hidden alone needs a gradient: what the tapped node returns must not ask for more."""
    hidden, weight, _, rows, targets, _ = make_inputs(*SHAPES[0])
    hidden.requires_grad_()
    schedules = []

    def fn(*args, **options):
        schedules.append(explain_selected_logprob(*args, **options).schedule)
        return selected_logprob(*args, **options)

    fn(hidden, weight, rows, targets, impl=impl).sum().backward()
    assert schedules == ["frozen_head"] and weight.grad is None


@pytest.mark.parametrize("over", OVER)
def test_backward_twice_gives_the_same(impl, over):
    hidden, weight, _, rows, targets, up = make_inputs(*SHAPES[1])
    hidden.requires_grad_(), weight.requires_grad_()
    logp = selected_logprob(hidden, weight, rows, targets, over=over, impl=impl)
    first = torch.autograd.grad(logp, (hidden, weight), up, retain_graph=True)
    second = torch.autograd.grad(logp, (hidden, weight), up)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_rows_is_a_differentiable_zero(impl, over, frozen):
    hidden, weight, bias, rows, targets, _ = make_inputs(8, 0, 16, 31, 3, bias=True)
    leaves = [hidden] if frozen else [hidden, weight, bias]
    for x in leaves:
        x.requires_grad_()
    logp = selected_logprob(hidden, weight, rows, targets, bias=bias, over=over, impl=impl)
    assert logp.shape == (0, 3) and logp.grad_fn is not None
    logp.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


@pytest.mark.parametrize("over", OVER)
def test_rows_of_a_wider_buffer(impl, over):
    hidden, weight, _, rows, targets, up = make_inputs(9, 13, 10, 33, 4, dtype=torch.float64)
    inputs = (hidden, weight, None, rows, targets, up)
    straight = run(selected_logprob, inputs, dtype=torch.float64, over=over, impl=impl)
    h, w = (torch.cat([x, x], 1)[:, : x.shape[1]].requires_grad_() for x in (hidden, weight))
    t = torch.cat([targets, targets], 1)[:, : targets.shape[1]]
    assert not h.is_contiguous() and not w.is_contiguous() and not t.is_contiguous()
    logp = selected_logprob(h, w, rows, t, over=over, impl=impl)
    grads = torch.autograd.grad(logp, (h, w), up.double())
    for a, b in zip((logp, *grads), straight.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_weight_gradient_is_summed_in_float32(impl):
    """400 rows, all alike: a bfloat16 sum stops growing after 256 terms."""
    hidden, weight, _, _, _, _ = make_inputs(1, 1, 16, 31, 1, dtype=torch.bfloat16)
    rows, targets = torch.zeros(400, dtype=torch.int32), torch.tensor([[3, 7]]).repeat(400, 1)
    inputs = (hidden, weight, None, rows, targets, torch.tensor([[1.0, 0.5]]).repeat(400, 1))
    truth = run(dense, inputs, dtype=torch.float64, over="targets")
    found = ours(inputs, impl=impl, dtype=torch.bfloat16, over="targets")
    for name in ("hidden", "weight"):
        torch.testing.assert_close(found[name].double(), truth[name], rtol=2 * 2**-8, atol=1e-6)


@pytest.mark.parametrize("over", OVER)
def test_autocast_does_not_reach_inside(impl, over):
    inputs = make_inputs(*SHAPES[1], bias=True)
    outside = ours(inputs, impl=impl, over=over)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(inputs, impl=impl, over=over)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


@pytest.mark.parametrize("over", OVER)
def test_not_a_number_stays_in_its_rows_and_is_not_hidden(impl, over):
    hidden, weight, _, _, _, _ = make_inputs(4, 1, 16, 101, 1)
    hidden[1, 3] = torch.nan
    rows, targets = (
        torch.arange(4, dtype=torch.int32),
        torch.tensor([[1, 2], [2, -1], [3, 9], [4, 8]]),
    )
    logp = selected_logprob(hidden, weight, rows, targets, over=over, impl=impl)
    assert logp.isnan().tolist() == [[False] * 2, [True, False], [False] * 2, [False] * 2]
