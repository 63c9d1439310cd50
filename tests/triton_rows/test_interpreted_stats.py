"""selected_stats' kernels, run on the CPU by Triton's interpreter, through the public function."""

import pytest
import torch
from numerics import assert_as_accurate
from ops import logprob_cases
from ops.stats_cases import (
    METRIC,
    VALUES,
    VARIANTS,
    WAYS,
    make_inputs,
    of_logits,
    ours,
    run,
    truth_of,
)

from sepo.ops import selected_logprob, selected_stats
from sepo_kernels.configs import CONFIGS
from sepo_kernels.selected_stats import reference, triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N, M, D, V), columns of a tile or None for the table's: a last tile of 5 columns; whole tiles;
# one tile wider than the row; no rows; rows repeat, N < M. Chunks of 5 rows: see budget_for
RAGGED, *OTHERS = [
    ((17, 7, 45, 101), 32),
    ((32, 7, 32, 64), 16),
    ((9, 7, 16, 31), None),
    ((8, 0, 16, 31), 16),
    ((4, 7, 16, 37), 16),
]


def check(shape, variant, way, dtype):
    options = dict(VARIANTS[variant])
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    truth = run(reference.selected_stats, inputs, dtype=torch.float64, way=way, **options)
    plain = run(reference.selected_stats, inputs, dtype=dtype, way=way, **options)
    found = ours(inputs, dtype=dtype, way=way, impl="triton", **options)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        if name != "top1":
            assert_as_accurate(found[name], plain[name], value, what=name)
    assert torch.equal(found["top1"], truth["top1"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_schedule_is_as_accurate_as_plain_pytorch(tile, way, dtype):
    shape, size = RAGGED
    tile(size)
    check(shape, "all", way, dtype)


@pytest.mark.parametrize(
    ("variant", "dtype"), [("plain", torch.float32), ("capped", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(("shape", "size"), OTHERS, ids=str)
def test_every_shape_is_as_accurate_as_plain_pytorch(tile, shape, size, variant, dtype):
    tile(size)
    for way in ("save", "entropy save", "entropy recompute"):
        check(shape, variant, way, dtype)


def test_vocabularies_that_end_within_a_tile(tile):
    tile(8192)
    V = 50257
    assert V % CONFIGS["stats_row"].BLOCK_V and V % CONFIGS["entropy_dlogits"].BLOCK_V
    check((5, 2, 16, V), "plain", "entropy save", torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("way", METRIC)
def test_a_metric_changes_no_bit_of_the_log_probability(tile, way, dtype):
    tile(32)
    inputs = make_inputs(17, 7, 45, 101, dtype=dtype, bias=True)
    options = dict(softcap=5.0, scale=0.7, impl="triton")
    found = ours(inputs, dtype=dtype, way=way, **options)
    budget = logprob_cases.budget_for(way, 101, dtype, **options)
    alone = logprob_cases.run(
        selected_logprob, inputs, dtype=dtype, schedule=way, budget=budget, **options
    )
    assert all(torch.equal(found[name], value) for name, value in alone.items())


@pytest.mark.parametrize("way", WAYS)
def test_equal_scales_give_the_bits_of_one(tile, way):
    tile(32)
    inputs = make_inputs(17, 7, 45, 101, bias=True)
    one, each = (
        ours(inputs, dtype=torch.float32, way=way, impl="triton", scale=scale)
        for scale in (0.7, torch.full((7,), 0.7))
    )
    assert all(torch.equal(one[name], each[name]) for name in one)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # done again
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("below", [8.0, 41.5, 41.75, 150.0])
def test_targets_far_below_the_largest(tile, below, dtype):
    """e^41.6 is 2^60: on this side the squares reach 2^120, beyond it the row is done again."""
    tile(32)
    z = torch.linspace(-4, 0, 101).repeat(3, 1)
    z[0, 60:], z[1, 2], z[2, 50] = 0.5, 6.0, 2.0
    z[:, 30] = z.amax(-1) - below
    z = z.bfloat16().float()
    targets = torch.full((3,), 30)
    found, weight = of_logits(z, targets, dtype, impl="triton")
    truth = truth_of(z, targets)
    for name in set(VALUES) - {"top1"}:
        value = getattr(found, name).detach().double()
        torch.testing.assert_close(value, truth[name], rtol=2e-6, atol=2e-5, msg=name)
    assert not found.top1.any()
    exact = z.double().requires_grad_()
    p = exact.log_softmax(-1)
    (wanted,) = torch.autograd.grad(-(p.exp() * p).sum(), exact)
    (grad,) = torch.autograd.grad(found.entropy.sum(), weight)
    limit = 1e-5 if dtype == torch.float32 else 2**-6  # the interpreter truncates to bfloat16
    assert (grad.T.double() - wanted).abs().max() <= limit * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # done again
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("places", [(3, 12), (3, 40), (31, 32), (0, 100)])
def test_ties_go_to_the_earlier_id(tile, places, dtype):
    tile(16)
    hidden, weight, _, _, _, _ = make_inputs(9, 1, 24, 101, dtype=dtype)
    first, second = places
    weight[first] = weight[second] = 3 * hidden[7]
    hidden[:] = hidden[7]
    rows, targets = torch.arange(9, dtype=torch.int32), torch.full((9,), 90)
    targets[::3], targets[1::3] = first, second
    found = selected_stats(hidden, weight, rows, targets, impl="triton")
    assert torch.equal(found.top1, targets == first)


@pytest.mark.parametrize("hot", [0, 3, 100], ids=str)
def test_a_row_of_one_word_has_no_entropy_and_no_gradient_of_it(tile, hot):
    tile(16)
    z = torch.full((1, 101), -256.0)
    z[:, hot] = 0.0
    found, weight = of_logits(z, torch.tensor([hot]), impl="triton")
    assert found.entropy.item() == found.log_sum_sq.item() == 0 and found.top1.item()
    (grad,) = torch.autograd.grad(found.entropy.sum(), weight)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # inf - inf, left out
def test_words_that_are_ruled_out_have_no_share(tile):
    """A bias of -inf over the whole first tile and the end."""
    tile(16)
    hidden, weight, bias, rows, _, up = make_inputs(8, 6, 16, 61, bias=True)
    bias[:20] = bias[57:] = -torch.inf
    inputs = (hidden, weight, bias, rows, torch.arange(20, 26), up)
    truth = run(reference.selected_stats, inputs, dtype=torch.float64)
    found = run(selected_stats, inputs, dtype=torch.float32, entropy_grad=True, impl="triton")
    for name, value in truth.items():
        torch.testing.assert_close(
            found[name].to(value.dtype), value, rtol=1e-5, atol=1e-6, msg=name
        )


def test_a_target_that_is_no_column_is_nan_and_spoils_nothing_else():
    hidden, weight, *_ = make_inputs(3, 2, 16, 31)
    targets = torch.tensor([31, 30, -100])
    logits = torch.empty(3, 31)
    logp, lse, row_scale, entropy, *others = triton.forward(
        hidden, weight, None, targets, 1.0, None, None, logits, keep=True
    )
    assert logp.isnan().tolist() == [True, False, True]
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(
        entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=1e-6
    )
    assert not others[2][[0, 2]].any()


def test_compiles_with_fullgraph():
    """`why_not` runs while Dynamo traces."""
    hidden, weight, _, rows, targets, _ = make_inputs(8, 6, 16, 31)
    op = lambda *args: selected_stats(*args, impl="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found = compiled(hidden, weight, rows, targets)
    assert all(map(torch.equal, found, op(hidden, weight, rows, targets)))
