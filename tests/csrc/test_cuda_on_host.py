"""The CUDA kernels select and sum as their definitions do: their own sources, run on the CPU.

on_host/cuda_runtime.h says how. What only a GPU can show, speed and its memory model, is not here.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT

from sepo_kernels.segment_reduce import reference as reduce_reference
from sepo_kernels.segment_topk import reference
from sepo_kernels.segment_topk.counts import selected_offsets

CUDA, ON_HOST = ROOT / "csrc" / "cuda", ROOT / "tests" / "csrc" / "on_host"
# the order of the enumerations in csrc/cuda/segment_topk.h
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIDES = ("highest", "lowest", "alternate")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("on_host") / "kernels.so"
    sources = sorted(CUDA.glob("*.cu"))
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    build = ["g++", *flags, "-shared", "-fPIC", "-I", ON_HOST, "-x", "c++", *sources, "-o", library]
    subprocess.run(build, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def select(kernels, score, lengths, fraction, side, min_tokens=1):
    """index and cu_rows as the kernel gives them; checks that it writes nothing around index."""
    cu_tokens = torch.tensor([0, *lengths]).cumsum(0)
    cu_tokens, cu_rows, M = selected_offsets(cu_tokens, fraction, min_tokens, score.device)
    index = torch.full((M + 2,), -7, dtype=torch.int32)
    sizes = [ctypes.c_int64(score.numel()), ctypes.c_int64(len(lengths)), SIDES.index(side), None]
    arguments = [pointer(score), DTYPES.index(score.dtype), pointer(cu_tokens), pointer(cu_rows)]
    assert kernels.sepo_segment_topk(*arguments, pointer(index[1:]), *sizes) == 0
    assert index[0] == index[-1] == -7
    return index[1:-1], cu_rows


def expect(kernels, score, lengths, *options):
    cu_tokens = torch.tensor([0, *lengths]).cumsum(0)
    fraction, side, *rest = options
    expected = reference.segment_topk(score, cu_tokens, fraction, side, min_tokens=(*rest, 1)[0])
    got = select(kernels, score, lengths, *options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# few distinct values, so that ties are the rule; both zeros; infinities; NaN of both signs
INF, NAN = float("inf"), float("nan")
VALUES = [-INF, -1.5, -0.0, 0.0, 1.0, 2.0, INF, NAN, -NAN]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=4),
    data=st.data(),
    fraction=st.sampled_from([0.01, 0.29, 0.5, 1.0]),
    side=st.sampled_from(SIDES),
    min_tokens=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_topk_equals_the_definition(kernels, lengths, data, fraction, side, min_tokens, dtype):
    size = sum(lengths)
    score = torch.tensor(data.draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size)))
    expect(kernels, score.to(dtype), lengths, fraction, side, min_tokens)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_of_distinct_scores_reads_every_digit(kernels, dtype, side):
    # not one block's width, nor a multiple of a warp's; numbers of every magnitude
    lengths = [257, 0, 1, 700, 31]
    score = torch.randn(sum(lengths)) * torch.logspace(-5, 4, sum(lengths))
    expect(kernels, score.to(dtype), lengths, 0.3, side)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_ranks_infinities_first_or_last_and_nan_behind(kernels, dtype):
    score = torch.tensor([NAN, 1.0, -INF, -NAN, INF]).to(dtype)
    for side in ("highest", "lowest"):
        for fraction in (0.2, 0.4, 0.6, 0.8):
            expect(kernels, score, [5], fraction, side)


@pytest.mark.parametrize("ties", [False, True])
def test_topk_of_a_segment_longer_than_many_blocks(kernels, ties):
    lengths = [5, 123_456, 0]  # a mean above 2048: the wide block
    score = torch.randn(sum(lengths))
    expect(kernels, score.round() if ties else score, lengths, 0.3, "alternate")


def test_topk_of_one_key(kernels):
    expect(kernels, torch.zeros(600), [600], 0.5, "lowest")
    expect(kernels, torch.full((600,), NAN), [600], 0.5, "highest")


def test_topk_of_nothing_launches_nothing(kernels):
    expect(kernels, torch.zeros(0), [], 0.5, "highest")
    expect(kernels, torch.zeros(0), [0, 0], 0.5, "highest")


def test_topk_refuses_an_unknown_dtype(kernels):
    nothing, zero = ctypes.c_void_p(), ctypes.c_int64(0)
    assert kernels.sepo_segment_topk(nothing, 4, *[nothing] * 3, zero, zero, 0, nothing) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 0, 3], [255, 256, 257, 0, 31], [5000, 2]])
def test_sum_equals_the_definition_and_spreads_its_gradient(kernels, lengths, dtype):
    M, S, is_double = sum(lengths), len(lengths), int(dtype == torch.float64)
    values, grad_sum = torch.randn(M, dtype=dtype), torch.randn(S, dtype=dtype)
    cu_rows = torch.tensor([0, *lengths]).cumsum(0).int()
    sums, grad = torch.full((S + 2,), 7.0, dtype=dtype), torch.full((M + 2,), 7.0, dtype=dtype)

    tail = [ctypes.c_int64(S), None]
    forward = [pointer(values), is_double, pointer(cu_rows), pointer(sums[1:])]
    assert kernels.sepo_segment_sum(*forward, *tail) == 0
    backward = [pointer(grad_sum), is_double, pointer(cu_rows), pointer(grad[1:])]
    assert kernels.sepo_segment_sum_bwd(*backward, *tail) == 0

    assert sums[0] == sums[-1] == grad[0] == grad[-1] == 7
    expected = reduce_reference.segment_sum(values.double(), cu_rows)
    torch.testing.assert_close(sums[1:-1].double(), expected, rtol=1e-5, atol=1e-5)
    if dtype == torch.float64:
        torch.testing.assert_close(sums[1:-1], expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(grad[1:-1], grad_sum.repeat_interleave(torch.tensor(lengths).long()))
