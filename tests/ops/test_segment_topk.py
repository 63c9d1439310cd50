"""segment_topk equals its definition, counts what the paper counts, and refuses by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import implementations
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sepo.ops import segment_topk
from sepo_kernels.segment_topk import IMPLS, reference

SIDES = ["highest", "lowest", "alternate"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
impl = implementations.fixture(IMPLS)


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# few distinct values, so that ties are the rule; both zeros; infinities; NaN of both signs
INF, NAN = float("inf"), float("nan")
VALUES = st.sampled_from([-INF, -1.5, -0.0, 0.0, 1.0, 2.0, INF, NAN, -NAN])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=6),
    data=st.data(),
    fraction=st.sampled_from([0.01, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0]),
    side=st.sampled_from(SIDES),
    min_tokens=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_the_definition(lengths, data, fraction, side, min_tokens, dtype):
    score = data.draw(st.lists(VALUES, min_size=sum(lengths), max_size=sum(lengths)))
    score, cu = torch.tensor(score, dtype=dtype), offsets(lengths)
    expected = reference.segment_topk(score, cu, fraction, side, min_tokens=min_tokens)
    for impl in implementations.on_cpu(IMPLS):
        got = segment_topk(score, cu, fraction, side, min_tokens=min_tokens, impl=impl)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.int32 and torch.equal(a, b)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_distinct_scores(impl, dtype, side):
    lengths = [0, 1, 63, 64, 65, 0, 1000, 4097, 30_000, 2, 0]
    # numbers of every magnitude, so that every bit of the key is looked at
    score = torch.randn(sum(lengths), dtype=torch.float64) * torch.logspace(-5, 4, sum(lengths))
    score, cu = score.to(dtype), offsets(lengths)
    expected = reference.segment_topk(score, cu, 0.3, side)
    got = segment_topk(score, cu, 0.3, side, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_threads_share_the_segments_without_losing_one(impl):
    lengths = torch.randint(3000, generator=torch.Generator().manual_seed(0), size=(100,)).tolist()
    score, cu = torch.randn(sum(lengths)), offsets(lengths)
    one = segment_topk(score, cu, 0.3, "alternate", impl=impl)
    torch.set_num_threads(3)
    try:
        three = segment_topk(score, cu, 0.3, "alternate", impl=impl)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


COUNTS = {0.1: [1, 1, 1, 1, 1, 1], 0.3: [1, 1, 1, 2, 3, 3], 0.5: [1, 1, 2, 3, 5, 5]}


@pytest.mark.parametrize("fraction", COUNTS)
@pytest.mark.parametrize("side", SIDES)
def test_counts(impl, fraction, side):
    cu = offsets([1, 3, 4, 7, 10, 11])
    _, cu_rows = segment_topk(torch.randn(int(cu[-1])), cu, fraction, side, impl=impl)
    assert cu_rows.diff().tolist() == COUNTS[fraction]


def test_count_is_not_lost_to_floating_point(impl):
    assert 0.29 * 100 < 29
    index, _ = segment_topk(torch.arange(100.0), offsets([100]), 0.29, "highest", impl=impl)
    assert index.tolist() == list(range(71, 100))


def test_ties_go_to_the_earlier_token(impl):
    score, cu = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), offsets([5])
    assert segment_topk(score, cu, 0.5, "highest", impl=impl)[0].tolist() == [1, 2]
    assert segment_topk(score, cu, 0.5, "lowest", impl=impl)[0].tolist() == [0, 3]


def test_alternate_takes_chosen_high_and_rejected_low(impl):
    score = torch.tensor([0.0, 3.0, 1.0, 0.0, 3.0, -1.0])
    index, cu_rows = segment_topk(score, offsets([3, 3]), 0.34, "alternate", impl=impl)
    assert index.tolist() == [1, 5] and cu_rows.tolist() == [0, 1, 2]


def test_empty_segments_select_nothing_and_keep_their_parity(impl):
    score = torch.tensor([1.0, 2.0, 5.0, 4.0])
    index, cu_rows = segment_topk(score, offsets([0, 2, 0, 2, 0]), 0.5, "alternate", impl=impl)
    assert index.tolist() == [0, 3] and cu_rows.tolist() == [0, 0, 1, 1, 2, 2]


def test_min_tokens_is_capped_at_the_segment(impl):
    cu = offsets([2, 5])
    _, cu_rows = segment_topk(torch.randn(7), cu, 0.1, "lowest", min_tokens=3, impl=impl)
    assert cu_rows.diff().tolist() == [2, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_ranks_last_on_both_sides(impl, dtype):
    score = torch.tensor([NAN, 1.0, -INF, -NAN, INF]).to(dtype)
    for side in ("highest", "lowest"):
        index, _ = segment_topk(score, offsets([5]), 0.6, side, impl=impl)
        assert index.tolist() == [1, 2, 4]


def test_a_strided_score_and_wide_offsets(impl):
    score, cu = torch.randn(24)[::2], torch.tensor([0, 9, 5, 9, 12])[::2].contiguous()
    assert not score.is_contiguous() and cu.dtype == torch.int64
    expected = reference.segment_topk(score, cu, 0.5, "alternate")
    got = segment_topk(score, cu, 0.5, "alternate", impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_operator_registration_and_compilation(impl):
    score, cu = torch.randn(12), offsets([5, 0, 7])
    args = (score, cu, 0.5, "alternate", 1, impl)
    torch.library.opcheck(torch.ops.sepo.segment_topk.default, args)
    fn = lambda score, cu: segment_topk(score, cu, 0.5, "alternate", impl=impl)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(score, cu), fn(score, cu), strict=True):
        assert torch.equal(a, b)


def test_outputs_are_where_the_score_is():
    with FakeTensorMode(shape_env=ShapeEnv()):
        score, cu = torch.empty(12, device="cuda"), torch.empty(3, dtype=torch.int64)
        index, cu_rows = segment_topk(score, cu, 0.5, "lowest", impl="sorting")
    assert index.device.type == cu_rows.device.type == "cuda" and cu_rows.shape == (3,)
    assert index.dtype == cu_rows.dtype == torch.int32


def test_a_score_with_a_gradient_is_only_read(impl):
    score = torch.randn(3, requires_grad=True)
    index, _ = segment_topk(score, offsets([3]), 0.5, "lowest", impl=impl)
    assert not index.requires_grad


REFUSALS = {
    "zero": (dict(fraction=0.0), "0 < fraction <= 1, got 0.0"),
    "above one": (dict(fraction=1.1), "0 < fraction <= 1, got 1.1"),
    "nan": (dict(fraction=float("nan")), "0 < fraction <= 1, got nan"),
    "side": (dict(side="top"), 'highest, lowest, alternate, got "top"'),
    "min_tokens": (dict(min_tokens=-1), "min_tokens >= 0, got -1"),
    "rank": (dict(score=torch.zeros(2, 2)), r"score \(T_all,\).*got \(2, 2\) and \(2,\)"),
    "no offsets": (dict(cu_tokens=torch.zeros(0, dtype=torch.int32)), r"got \(4,\) and \(0,\)"),
    "integers": (dict(score=torch.zeros(4, dtype=torch.int32)), "floating-point score"),
    "offsets": (dict(cu_tokens=torch.zeros(2)), "int32 or int64 cu_tokens, got torch.float32"),
    "device": (
        dict(cu_tokens=torch.zeros(2, dtype=torch.int32, device="meta")),
        "on the CPU or with score on cpu, got meta",
    ),
    "too long": (
        dict(score=torch.zeros(1).expand(2**31)),
        r"fewer than 2\*\*31 tokens, got 2147483648",
    ),
    "end": (dict(cu_tokens=offsets([3])), "cu_tokens from 0 to 4, got from 0 to 3"),
    "start": (dict(cu_tokens=torch.tensor([1, 4])), "cu_tokens from 0 to 4, got from 1 to 4"),
    "falls": (
        dict(cu_tokens=torch.tensor([0, 3, 2, 4])),
        "cu_tokens that never falls, got 3, 2 at 1",
    ),
    "impl": (dict(impl="fast"), 'unknown impl "fast", expected one of: auto, native, sorting'),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_by_name(case):
    wrong, message = REFUSALS[case]
    good = dict(score=torch.zeros(4), cu_tokens=offsets([4]), fraction=0.5, side="lowest")
    with pytest.raises(ValueError, match=message):
        segment_topk(**good | wrong)


# good: cu_tokens 0, 4 and cu_rows 0, 2
NATIVE_REFUSALS = {
    "tokens": (dict(cu_tokens=offsets([5])), "from 0 to 4 and to 2, got 0 to 5 and 0 to 2"),
    "rows": (dict(M=3), "from 0 to 4 and to 3, got 0 to 4 and 0 to 2"),
    "K": (dict(cu_tokens=offsets([1, 3]), cu_rows=offsets([2, 0])), "K = 2 and T = 1 in segment 0"),
    "dtype": (dict(cu_rows=torch.tensor([0, 2])), "int32 cu_tokens, cu_rows"),
    "sizes": (dict(cu_rows=offsets([1, 1])), "int32 cu_tokens, cu_rows"),
    "score": (dict(score=torch.zeros(4, dtype=torch.int32)), "floating-point score, got Int"),
}


@pytest.mark.native
@pytest.mark.parametrize("case", NATIVE_REFUSALS)
def test_the_native_operator_reads_nothing_outside_its_tensors(case):
    wrong, message = NATIVE_REFUSALS[case]
    good = dict(score=torch.zeros(4), cu_tokens=offsets([4]), cu_rows=offsets([2]), side=0, M=2)
    with pytest.raises(ValueError, match=message):
        torch.ops.sepo.native_segment_topk(*(good | wrong).values())
