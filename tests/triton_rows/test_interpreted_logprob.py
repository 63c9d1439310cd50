"""selected_logprob's kernels, run on the CPU by Triton's interpreter, through the public function."""

import mmap

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops.logprob_cases import SCHEDULES, VARIANTS, budget_for, checked, make_inputs, run

from sepo.ops import selected_logprob
from sepo_kernels import triton_logprob, triton_rows
from sepo_kernels.configs import CONFIGS
from sepo_kernels.selected_logprob import reference, triton

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


def check(shape, variant, schedule, dtype):
    M, V, options = shape[1], shape[3], dict(VARIANTS[variant])
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    like = dict(schedule=schedule, **options)
    truth = run(reference.selected_logprob, inputs, dtype=torch.float64, **like)
    plain = run(reference.selected_logprob, inputs, dtype=dtype, **like)
    budget = budget_for(schedule, V, dtype, impl="triton", **options)
    ours = run(checked(schedule, M), inputs, dtype=dtype, budget=budget, impl="triton", **like)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        assert_as_accurate(ours[name], plain[name], value, what=name)
    assert max_error(ours["logp"], truth["logp"]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_every_schedule_is_as_accurate_as_plain_pytorch(tile, variant, schedule, dtype):
    shape, size = RAGGED
    tile(size)
    check(shape, variant, schedule, dtype)


@pytest.mark.parametrize(
    ("variant", "dtype"), [("plain", torch.float32), ("all", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(("shape", "size"), OTHERS, ids=str)
def test_every_shape_is_as_accurate_as_plain_pytorch(tile, shape, size, variant, dtype):
    tile(size)
    for schedule in SCHEDULES:
        check(shape, variant, schedule, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_by_itself(tile, variant):
    tile(32)
    check(RAGGED[0], variant, "recompute", torch.float32)


@pytest.mark.parametrize(("V", "dtype"), [(50257, torch.float16), (128256, torch.float32)])
def test_vocabularies_that_end_within_a_tile(tile, V, dtype):
    tile(8192)
    assert V % CONFIGS["logprob_row"].BLOCK_V and V % CONFIGS["logprob_dlogits"].BLOCK_V
    check((5, 2, 16, V), "plain", "save", dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_repeatable_bit_for_bit(tile, schedule):
    tile(32)
    inputs = make_inputs(17, 7, 45, 101, bias=True)
    op = dict(schedule=schedule, budget=budget_for(schedule, 101, impl="triton"), impl="triton")
    first, second = (run(selected_logprob, inputs, dtype=torch.float32, **op) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_of_a_confident_row_keeps_its_relative_precision():
    """p = 1 - 1e-4: rounded to bfloat16 p is 1, and p - 1 would be 0."""
    hidden = torch.eye(4, dtype=torch.bfloat16)[:1].clone()
    weight = torch.tensor([[10.0], [0.5], [0.0], [-1.0]]).bfloat16() * torch.eye(4)[0].bfloat16()
    rows, targets = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    inputs = (hidden, weight, None, rows, targets, torch.ones(1))
    truth = run(reference.selected_logprob, inputs, dtype=torch.float64)["weight"]
    ours = run(selected_logprob, inputs, dtype=torch.bfloat16, impl="triton")["weight"]
    torch.testing.assert_close(ours.double(), truth, rtol=2**-7, atol=0)


def test_a_padded_vocabulary_has_no_share(tile):
    """A bias of -inf over the whole first tile and the end: inf - inf would be NaN."""
    tile(16)
    hidden, weight, bias, rows, _, up = make_inputs(8, 6, 16, 61, bias=True)
    bias[:20] = bias[57:] = -float("inf")
    inputs = (hidden, weight, bias, rows, torch.arange(20, 26), up)
    truth = run(reference.selected_logprob, inputs, dtype=torch.float64)
    ours = run(selected_logprob, inputs, dtype=torch.float32, impl="triton")
    for name, value in truth.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # done again, see below
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 39.0, 43.0, 1e4])
def test_extreme_logits_are_finite(size, dtype):
    """A target may be hopeless: by e^43 or more its row is done again from the largest logit."""
    hidden = torch.tensor([[size], [-size]], dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    inputs = (hidden, weight, None, torch.tensor([0, 1, 0], dtype=torch.int32),
              torch.tensor([0, 0, 2]), torch.ones(3))  # fmt: skip
    truth = run(reference.selected_logprob, inputs, dtype=torch.float64)
    ours = run(selected_logprob, inputs, dtype=dtype, impl="triton")
    # Triton's interpreter truncates to bfloat16, where a GPU rounds: twice, and once by PyTorch
    digits = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-5}[dtype]
    for name, value in truth.items():
        rtol = 1e-6 if name == "logp" else digits
        atol = max(1e-6, (rtol - 1e-6) * value.abs().max().item())  # terms cancel
        torch.testing.assert_close(ours[name].double(), value, rtol=rtol, atol=atol, msg=name)


def test_targets_and_bias_need_not_be_contiguous(tile):
    tile(16)
    hidden, weight, bias, rows, targets, up = make_inputs(8, 6, 16, 31, bias=True)
    straight = (hidden, weight, bias, rows, targets, up)
    sparse = (hidden, weight, torch.stack([bias, bias], 1)[:, 0], rows,
              torch.stack([targets, targets], 1)[:, 0], up)  # fmt: skip
    a, b = (
        run(selected_logprob, x, dtype=torch.float32, impl="triton") for x in (straight, sparse)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_that_is_no_column_is_nan_and_spoils_nothing_else(dtype):
    """Its logp is; the dlogits of its row, which a gradient of 0 will multiply, is finite."""
    hidden, weight, _, _, _, _ = make_inputs(3, 2, 16, 31, dtype=dtype)
    dlogits, logits = torch.empty(3, 31, dtype=dtype), torch.empty(3, 31)
    logits = dlogits if dtype == torch.float32 else logits
    targets = torch.tensor([31, 30, -100])
    logp, lse, row_scale = triton.forward(hidden, weight, None, targets, 1.0, None, dlogits, logits)
    assert logp.isnan().tolist() == [True, False, True]
    p = (hidden.double() @ weight.double().T).softmax(-1)
    p[1, 30] -= 1
    found = dlogits.double() * row_scale[:, None]
    torch.testing.assert_close(found, p, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert lse.isfinite().all()


def test_rows_beyond_2_31_elements(tmp_path):
    """In 16 GiB that are never filled: row 2 starts at element 2**31 + 2.

    The block begins in the middle of them, so that an offset wrapped to 32 bits reads zeros.
    """
    stride, V, middle = 2**30 + 1, 5, 2**31
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(4 * (middle + 2 * stride + V))
        memory = mmap.mmap(file.fileno(), 0)
    at = lambda row: torch.frombuffer(memory, dtype=torch.float32, count=V,
                                      offset=4 * (middle + row * stride))  # fmt: skip
    wanted = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    for row in range(3):
        at(row).copy_(wanted[row])
    targets = torch.tensor([1, 3, 4])
    logp, lse, reference, row_scale = torch.empty(4, 3)
    triton_rows.launch(
        triton_logprob.logprob_row, 3, None,
        at(0), logp, targets, logp, lse, reference, row_scale, at(0), stride, stride, V, 0, logp, 0,
        1.0, 0.0,
        CAPPED=False, WRITE_DLOGITS=False,
    )  # fmt: skip
    torch.testing.assert_close(lse, wanted.logsumexp(-1))
    torch.testing.assert_close(logp, wanted.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    triton_rows.launch(
        triton_logprob.logprob_dlogits, 3, V,
        at(0), logp, targets, logp, reference, row_scale, at(0), stride, stride, V, 0, logp, 0,
        1.0, 0.0,
        CAPPED=False,
    )  # fmt: skip
    dlogits = wanted.softmax(-1) - torch.nn.functional.one_hot(targets, V)
    torch.testing.assert_close(torch.stack([at(row) for row in range(3)]), dlogits)


def test_compiles_with_fullgraph():
    """`why_not` runs while Dynamo traces."""
    inputs = make_inputs(8, 6, 16, 31)
    op = lambda *args: selected_logprob(*args, impl="triton")
    hidden, weight, _, rows, targets, _ = inputs
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, rows, targets), op(hidden, weight, rows, targets))


def test_refuses_float64():
    rows, targets = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    hidden, weight = torch.ones(3, 4, dtype=torch.float64), torch.ones(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="compute in float32, got torch.float64"):
        selected_logprob(hidden, weight, rows, targets, impl="triton")
