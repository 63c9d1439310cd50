"""target_logits' kernels, run on the CPU by Triton's interpreter, most through the operation."""

import mmap

import pytest
import torch
from numerics import assert_as_accurate, max_error
from ops.k_target_cases import OVER, dense, make_inputs, ours, run
from ops.logprob_cases import VARIANTS

from sepo_kernels.target_logits import reference, triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N, M, D, V, K), columns of a tile or None for the table's: a last tile of 5 columns, rows repeat;
# whole tiles; one tile wider than D, more targets than are added up at once; no rows
RAGGED, *OTHERS = [
    ((4, 5, 21, 31, 3), 16),
    ((5, 4, 32, 31, 2), 16),
    ((4, 2, 12, 31, 11), None),
    ((8, 0, 16, 31, 3), 16),
]


def check(shape, variant, over, dtype, schedule="save"):
    options = dict(VARIANTS[variant])
    inputs = make_inputs(*shape, dtype=dtype, bias=options.pop("bias"))
    options |= dict(over=over, schedule=schedule)
    truth, plain = (run(dense, inputs, dtype=d, **options) for d in (torch.float64, dtype))
    found = ours(inputs, impl="triton", dtype=dtype, **options)
    assert found.keys() == truth.keys()
    factor = 4 if over == "vocabulary" and dtype == torch.float32 else 2  # as in test_k_targets.py
    # the interpreter truncates dlogits to bfloat16, where a GPU rounds
    truncated = (over, dtype) == ("vocabulary", torch.bfloat16)
    for name in ["logp"] if truncated else truth:
        assert_as_accurate(found[name], plain[name], truth[name], what=name, factor=factor)
    assert max_error(found["logp"], truth["logp"]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", OVER)
def test_as_accurate_as_plain_pytorch(tile, over, dtype):
    """Targets that are absent, and some that are there twice in a row."""
    shape, size = RAGGED
    tile(size)
    check(shape, "all", over, dtype)


@pytest.mark.parametrize(("shape", "size"), OTHERS, ids=str)
def test_every_shape_is_as_accurate_as_plain_pytorch(tile, shape, size):
    tile(size)
    check(shape, "plain", "targets", torch.float32)


@pytest.mark.parametrize("schedule", ["recompute", "frozen_head", "no_grad"])
def test_beside_every_schedule(schedule):
    check((3, 3, 16, 31, 2), "plain", "vocabulary", torch.float32, schedule)


@pytest.mark.parametrize("terms", [8, 9, 17])
def test_terms_of_one_target(terms):
    """As many as are added up at once, and more; another target comes after, and one before."""
    targets = torch.tensor([0, *[7] * terms, 9])[:, None]
    g = torch.Generator().manual_seed(0)
    factor, hidden = torch.randn(len(targets), 1, generator=g), torch.randn(3, 5, generator=g)
    rows = torch.arange(len(targets), dtype=torch.int32) % 3
    grad = torch.ones(10, 5)
    triton.add_to_targets(grad, factor, hidden, rows, targets, 0)
    wanted = torch.ones(10, 5).index_add(0, targets[:, 0], factor * hidden[rows])
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_a_target_that_is_no_row_of_the_head():
    """On a GPU nobody refuses it: nothing is read or written for it."""
    hidden, weight, _, rows, targets, _ = make_inputs(4, 3, 12, 31, 3)
    targets[0, 1], targets[1, 0], targets[2] = 31, 1 << 40, -1  # the last row has none at all
    present = (targets >= 0) & (targets < 31)
    inside = targets.where(present, 0)
    found = triton.dots(hidden, weight, rows, targets, 0)
    right = reference.target_logits(hidden, weight, rows, inside)
    torch.testing.assert_close(found, right.where(present, 0))
    factor = torch.linspace(-1, 1, 9).view(3, 3)
    one_hot = torch.nn.functional.one_hot(inside, 31) * factor.where(present, 0)[..., None]
    sums = triton.sum_targets(factor, weight, targets, 0)
    torch.testing.assert_close(sums, (one_hot @ weight).sum(1))
    grad = torch.ones(31, 12)
    triton.add_to_targets(grad, factor, hidden, rows, targets, 0)
    torch.testing.assert_close(grad - 1, one_hot.sum(1).T @ hidden[rows], rtol=1e-5, atol=1e-5)


def test_rows_of_the_head_beyond_2_31_elements(tmp_path):
    """In 16 GiB that are never filled: the head's row 2 starts at its element 2**31 + 32.

    The head begins in the middle of them, so that an offset wrapped to 32 bits reads zeros.
    """
    V, D, stride, middle = 3, 5, 2**30 + 16, 2**31
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(4 * (middle + (V - 1) * stride + D))
        memory = mmap.mmap(file.fileno(), 0)
    flat = torch.frombuffer(memory, dtype=torch.float32, offset=4 * middle)
    weight = flat.as_strided((V, D), (stride, 1))
    small = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    weight.copy_(small)
    x, rows = small[:2] + 1, torch.arange(2, dtype=torch.int32)
    targets, factor = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    z = triton.dots(x, weight, rows, targets, 0)
    torch.testing.assert_close(z, (x @ small.T).gather(1, targets))
    sums = triton.sum_targets(factor, weight, targets, 0)
    torch.testing.assert_close(sums, (factor[..., None] * small[targets]).sum(1))
    triton.add_to_targets(weight, factor, x, rows, targets, 0)
    values = (factor[..., None] * x[:, None]).flatten(0, 1)
    torch.testing.assert_close(weight.clone(), small.index_add(0, targets.flatten(), values))
