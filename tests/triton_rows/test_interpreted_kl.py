"""selected_logprob_kl's kernels, run on the CPU by Triton's interpreter, through the public function."""

from itertools import product

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops.kl_cases import (
    DIRECTIONS,
    SCHEDULES,
    VARIANTS,
    Inputs,
    budget_for,
    checked,
    make_inputs,
    run,
)

from sepo.ops import selected_logprob, selected_logprob_kl
from sepo_kernels import triton_kl_dlogits, triton_rows
from sepo_kernels.configs import CONFIGS
from sepo_kernels.selected_logprob_kl import layout, reference, triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
JSD = ("jsd", 0.3)
DIVERGENCES = [*DIRECTIONS, JSD]
# (N, M, D, D_ref, V), columns of a tile
SMALL = [
    ((32, 7, 32, 32, 64), 32),
    ((9, 16, 16, 8, 37), 16),
    ((8, 0, 16, 24, 31), 16),
]


def check(shape, variant, name, direction, dtype):
    M, V, options = shape[1], shape[4], dict(VARIANTS[variant], direction=direction)
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    like = dict(schedule=name, **options)
    truth = run(reference.selected_logprob_kl, inputs, dtype=torch.float64, **like)
    plain = run(reference.selected_logprob_kl, inputs, dtype=dtype, **like)
    budget = budget_for(name, V, dtype)
    ours = run(checked(name, M), inputs, dtype=dtype, budget=budget, impl="triton", **like)
    assert ours.keys() == truth.keys()
    for what, value in truth.items():
        assert_as_accurate(ours[what], plain[what], value, what=what)
    for what in ("logp", "ref_logp", "kl"):
        assert max_error(ours[what], truth[what]) < 1e-5, what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["save", "recompute"])
def test_as_accurate_as_plain_pytorch(tile, name, direction, dtype):
    tile(32)
    check((17, 7, 45, 29, 101), "all", name, direction, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["save", "recompute"])
def test_jsd_is_as_accurate_as_plain_pytorch(tile, name, dtype):
    tile(16)
    check((13, 6, 16, 8, 45), "all", name, JSD, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("shape", "size"), SMALL, ids=str)
def test_shapes(tile, shape, size, name, direction):
    tile(size)
    check(shape, "all", name, direction, torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_by_itself(tile, variant):
    tile(32)
    check((17, 7, 45, 29, 101), variant, "recompute", "ref||policy", torch.float32)


@pytest.mark.parametrize(("V", "dtype"), [(50257, torch.float16), (128256, torch.float32)])
def test_vocabularies_that_end_within_a_tile(tile, V, dtype):
    """And whose gradient of the logits is made in several chunks of columns."""
    tile(8192)
    assert V % CONFIGS["kl_row"].BLOCK_V and V % CONFIGS["kl_dlogits"].BLOCK_V
    assert V > layout.MAX_COLUMNS
    check((5, 2, 16, 8, V), "plain", "save", "policy||ref", dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["save", "recompute"])
def test_repeatable_bit_for_bit(tile, name, direction):
    tile(32)
    inputs = make_inputs(17, 7, 45, 29, 101, bias=True)
    op = dict(schedule=name, direction=direction, budget=budget_for(name, 101), impl="triton")
    first, second = (run(selected_logprob_kl, inputs, **op) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_logp_is_that_of_the_single_head(tile):
    tile(32)
    x = make_inputs(17, 7, 45, 29, 101, bias=True)
    logp, ref_logp, _ = x.call(selected_logprob_kl, impl="triton")
    for found, hidden, weight, bias in (
        (logp, x.hidden, x.weight, x.bias),
        (ref_logp, x.ref_hidden, x.ref_weight, x.ref_bias),
    ):
        alone = selected_logprob(hidden, weight, x.rows, x.targets, bias=bias, impl="triton")
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("direction", DIVERGENCES, ids=str)
def test_equal_heads_differ_by_nothing(tile, direction):
    """Exactly 0; so is the gradient, which but for ref||policy has a rounded KL in it."""
    tile(32)
    x = make_inputs(37, 16, 45, 45, 101)
    x = x._replace(ref_hidden=x.hidden, ref_weight=x.weight, upstream=torch.tensor([[0.0], [1.0]]))
    x = x._replace(upstream=x.upstream.expand(2, 16))
    found = run(selected_logprob_kl, x, direction=direction, impl="triton")
    assert torch.equal(found["kl"], torch.zeros(16))
    assert torch.equal(found["weight"], torch.zeros(101, 45))


@pytest.mark.parametrize(
    ("direction", "distance"), [*product(DIRECTIONS, [1e-1, 1e-3]), (JSD, 1e-3)], ids=str
)
def test_gradient_near_the_reference_keeps_its_digits(tile, direction, distance):
    """p - q of two rounded numbers would leave 1e-4 of it at a distance of 1e-3."""
    tile(32)
    x = make_inputs(37, 16, 45, 45, 101)
    near = x.weight + distance * torch.randn(101, 45, generator=torch.Generator().manual_seed(1))
    x = x._replace(
        ref_hidden=x.hidden,
        ref_weight=near,
        upstream=torch.stack([torch.zeros(16), torch.ones(16)]),
    )
    truth = run(reference.selected_logprob_kl, x, dtype=torch.float64, direction=direction)
    found = run(selected_logprob_kl, x, dtype=torch.float32, direction=direction, impl="triton")
    assert max_error(found["kl"], truth["kl"]) < 1e-6
    # what is left is the error of log q - log p, a difference of logits of about 5
    limit = 1e-6 / distance + 1e-6
    assert max_error(found["weight"], truth["weight"]) < limit * truth["weight"].abs().max().item()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_near_the_reference_has_digits_for_unlikely_targets(tile, direction):
    """Relative to the target both sums are above e^15: two rounded logarithms would differ by 1e-6."""
    tile(32)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 101, generator=g)
    logits[:, 7] = logits.amax(-1) - 15
    near = logits + 1e-3 * torch.randn(32, 101, generator=g)
    log_p, log_q = logits.double().log_softmax(-1), near.double().log_softmax(-1)
    if direction == "ref||policy":
        log_p, log_q = log_q, log_p
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    x = torch.eye(32)
    kl = triton.forward(
        x, logits.T.contiguous(), None, x, near.T.contiguous(), None, torch.full((32,), 7), 1.0,
        None, 1.0, None, layout.DIRECTIONS[direction], None, (torch.empty(32, 101), torch.empty(32, 101)),
    )[2]  # fmt: skip
    assert (kl.double() - truth).abs().mean() < 2e-7


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # done again from there
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIVERGENCES, ids=str)
def test_extreme_logits_are_finite(direction, dtype):
    """Heads that are sure of other tokens: hopeless targets of one or of both."""
    size = 64.0 if dtype == torch.bfloat16 else 1e4  # of which float16 keeps 11 bits, see below
    hidden = torch.tensor([[size]], dtype=dtype)
    rows, targets = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 1, 2])
    head = lambda *values: torch.tensor(values, dtype=dtype)[:, None]
    x = Inputs(hidden, head(1, -1, 0), None, hidden, head(-1, 1, 0.5), None, rows, targets,
               torch.ones(2, 3))  # fmt: skip
    truth = run(reference.selected_logprob_kl, x, dtype=torch.float64, direction=direction)
    found = run(selected_logprob_kl, x, dtype=dtype, direction=direction, impl="triton")
    for name, value in truth.items():
        rtol, atol = 1e-6, 1e-6
        if name not in ("logp", "ref_logp", "kl"):
            rtol = 8 * torch.finfo(dtype).eps
            # bfloat16 keeps log q - log p, here 2 * size, and not the KL's slope, in 16 bits
            atol = 2**-11 * 2 * size * size if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[name].double(), value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of an -inf - -inf that has no weight
@pytest.mark.parametrize("direction", DIVERGENCES, ids=str)
def test_a_padded_vocabulary_has_no_share(tile, direction):
    """Biases of -inf over the whole first tile and the end: 0 log 0 = 0, not 0 * (inf - inf)."""
    tile(16)
    x = make_inputs(8, 16, 16, 8, 61, bias=True)
    for bias in (x.bias, x.ref_bias):
        bias[:20] = bias[57:] = -float("inf")
    x = x._replace(targets=torch.arange(20, 36))
    short = x._replace(
        weight=x.weight[20:57], bias=x.bias[20:57], ref_weight=x.ref_weight[20:57],
        ref_bias=x.ref_bias[20:57], targets=x.targets - 20,
    )  # fmt: skip
    truth = run(reference.selected_logprob_kl, short, dtype=torch.float64, direction=direction)
    found = run(selected_logprob_kl, x, dtype=torch.float32, direction=direction, impl="triton")
    for name, value in truth.items():
        inside = found[name][20:57] if name in ("weight", "bias") else found[name]
        torch.testing.assert_close(inside.double(), value, rtol=1e-5, atol=2e-6, msg=name)
    assert not found["weight"][:20].any() and not found["weight"][57:].any()


def test_nan_is_not_hidden_by_the_floor_at_zero():
    x = make_inputs(8, 16, 16, 8, 31)
    x.hidden[x.rows[3]] = float("nan")
    kl = x.call(selected_logprob_kl, impl="triton")[2]
    assert torch.equal(kl.isnan(), x.rows == x.rows[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_of_column_slices(dtype):
    """As the backward calls it: columns of the kept blocks, into columns of a wider buffer."""
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 40, generator=g).to(dtype) for _ in range(2))
    grad_logp, grad_kl = torch.randn(2, 5, generator=g)
    out = torch.full((5, 40), 7.0, dtype=dtype)
    triton_rows.launch(
        triton_kl_dlogits.kl_combine, 5, 13,
        first[:, 20:33], second[:, 20:33], grad_logp, grad_kl, out[:, :13], 40, 40, 40, 13,
    )  # fmt: skip
    wanted = grad_kl[:, None] * second.float() - grad_logp[:, None] * first.float()
    # Triton's interpreter truncates to bfloat16, where a GPU rounds
    rtol = 2**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(out[:, :13], wanted[:, 20:33].to(dtype), rtol=rtol, atol=0)
    assert (out[:, 13:] == 7).all()
