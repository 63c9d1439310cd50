"""segment_topk equals its definition, counts what the paper counts, and refuses by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sepo.ops import segment_topk
from sepo_kernels.segment_topk import IMPLS, reference

SIDES = ["highest", "lowest", "alternate"]


@pytest.fixture(params=IMPLS, ids=lambda impl: impl.name)
def impl(request):
    return request.param.name


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# few distinct values, so that ties are the rule; both zeros; infinities; NaN
VALUES = st.sampled_from([-float("inf"), -1.5, -0.0, 0.0, 1.0, 2.0, float("inf"), float("nan")])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=6),
    data=st.data(),
    fraction=st.sampled_from([0.01, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0]),
    side=st.sampled_from(SIDES),
    min_tokens=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_the_definition(lengths, data, fraction, side, min_tokens, dtype):
    score = data.draw(st.lists(VALUES, min_size=sum(lengths), max_size=sum(lengths)))
    score, cu = torch.tensor(score, dtype=dtype), offsets(lengths)
    expected = reference.segment_topk(score, cu, fraction, side, min_tokens=min_tokens)
    for impl in IMPLS:
        got = segment_topk(score, cu, fraction, side, min_tokens=min_tokens, impl=impl.name)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.int32 and torch.equal(a, b)


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
    _, cu_rows = segment_topk(torch.randn(7), offsets([2, 5]), 0.1, "lowest", min_tokens=3)
    assert cu_rows.diff().tolist() == [2, 3]


def test_nan_ranks_last_on_both_sides(impl):
    score = torch.tensor([float("nan"), 1.0, -float("inf"), float("inf")])
    for side in ("highest", "lowest"):
        index, _ = segment_topk(score, offsets([4]), 0.75, side, impl=impl)
        assert index.tolist() == [1, 2, 3]


def test_operator_registration_and_compilation(impl):
    score, cu = torch.randn(12), offsets([5, 0, 7])
    args = (score, cu, 0.5, "alternate", 1, impl)
    torch.library.opcheck(torch.ops.sepo.segment_topk.default, args)
    fn = lambda score, cu: segment_topk(score, cu, 0.5, "alternate", impl=impl)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(score, cu), fn(score, cu), strict=True):
        assert torch.equal(a, b)


def test_a_score_with_a_gradient_is_only_read(impl):
    index, _ = segment_topk(torch.randn(3, requires_grad=True), offsets([3]), 0.5, "lowest")
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
    "device": (dict(score=torch.zeros(4, device="meta")), "one device, got meta and cpu"),
    "impl": (dict(impl="fast"), 'unknown impl "fast", expected one of: auto, sorting'),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_by_name(case):
    wrong, message = REFUSALS[case]
    good = dict(score=torch.zeros(4), cu_tokens=offsets([4]), fraction=0.5, side="lowest")
    with pytest.raises(ValueError, match=message):
        segment_topk(**good | wrong)
