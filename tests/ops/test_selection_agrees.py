"""One rule of top-k, written twice: for training in numpy, for anybody's loop as an operation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import implementations

from sepo.data import select_positions
from sepo.data.selection import count_selected
from sepo.errors import InputError
from sepo.ops import segment_topk
from sepo_kernels.segment_topk import IMPLS

SIDES = ("highest", "lowest")
INF = float("inf")
# few distinct scores, so that ties are the rule; both zeros; infinities
TIES = st.sampled_from([-INF, -2.0, -0.5, -0.0, 0.0, 0.5, 3.0, INF])
# scores that are one number in float32 and two in float64
CLOSE = st.integers(0, 3).map(lambda n: 1.0 + n * 2.0**-30)
LENGTHS = st.lists(st.integers(0, 20), max_size=6)
# any number, and those where a plain floor counts one too few or a count just is a whole number
FRACTIONS = st.one_of(
    st.floats(0, 1, exclude_min=True),
    st.sampled_from([0.1, 0.29, 0.3, 0.57, 0.58, 1.0]),
    st.builds(lambda k, T: min(k, T) / T, st.integers(1, 20), st.integers(1, 20)),
)


def by_numpy(score, lengths, fraction, sides, min_tokens) -> tuple[list[int], list[int]]:
    """Positions in the whole score and where each segment's begin, by the trainer's selection."""
    index, cu_rows, start = [], [0], 0
    for length, side in zip(lengths, sides, strict=True):
        part = score[start : start + length]
        positions = select_positions(part, fraction, side, min_tokens=min_tokens)
        index += (start + positions).tolist()
        cu_rows.append(len(index))
        start += length
    return index, cu_rows


def by_operation(score, lengths, fraction, side, min_tokens, impl) -> tuple[list[int], list[int]]:
    cu_tokens = torch.tensor([0, *lengths]).cumsum(0)
    score = torch.from_numpy(score)
    found = segment_topk(score, cu_tokens, fraction, side, min_tokens=min_tokens, impl=impl)
    return found.indices.tolist(), found.cu_rows.tolist()


@settings(max_examples=400, deadline=None)
@given(
    lengths=LENGTHS,
    data=st.data(),
    values=st.sampled_from([TIES, CLOSE]),
    dtype=st.sampled_from([np.float32, np.float64]),
    fraction=FRACTIONS,
    side=st.sampled_from([*SIDES, "alternate"]),
    min_tokens=st.integers(0, 4),
)
def test_both_select_the_same(lengths, data, values, dtype, fraction, side, min_tokens):
    total = sum(lengths)
    score = np.array(data.draw(st.lists(values, min_size=total, max_size=total)), dtype)
    sides = [SIDES[s % 2] if side == "alternate" else side for s in range(len(lengths))]
    expected = by_numpy(score, lengths, fraction, sides, min_tokens)
    for impl in implementations.on_cpu(IMPLS):
        assert by_operation(score, lengths, fraction, side, min_tokens, impl) == expected


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.29, 0.3, 1 / 3, 0.57, 0.7, 1.0])
def test_both_count_the_same_of_every_length(fraction):
    lengths = list(range(400))
    score = np.zeros(sum(lengths), np.float32)
    expected = np.cumsum([0, *(count_selected(T, fraction) for T in lengths)]).tolist()
    for impl in implementations.on_cpu(IMPLS):
        assert by_operation(score, lengths, fraction, "highest", 1, impl)[1] == expected


def test_what_rounding_to_float32_makes_one_score_is_a_tie_for_both():
    exact = np.array([1.0, 1.0 + 2**-30, 1.0], np.float64)
    for dtype, best in ((np.float64, [1]), (np.float32, [0])):
        score = exact.astype(dtype)
        assert select_positions(score, 0.3, "highest").tolist() == best
        for impl in implementations.on_cpu(IMPLS):
            assert by_operation(score, [3], 0.3, "highest", 1, impl)[0] == best


@pytest.mark.parametrize("side", SIDES)
def test_the_one_difference_is_a_score_that_is_no_number(side):
    """Data are refused; a loop's tensor can't be looked at, so there it is selected last."""
    score = np.array([1.0, np.nan, -1.0], np.float32)
    with pytest.raises(InputError, match="expected finite scores, got NaN at position 1"):
        select_positions(score, 0.7, side)
    for impl in implementations.on_cpu(IMPLS):
        assert by_operation(score, [3], 0.7, side, 1, impl)[0] == [0, 2]
        assert by_operation(score, [3], 1.0, side, 1, impl)[0] == [0, 1, 2]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_both_refuse_the_same_fractions(fraction):
    message = f"expected 0 < fraction <= 1, got {fraction}"
    score = np.zeros(4, np.float32)
    with pytest.raises(InputError, match=message):
        select_positions(score, fraction, "highest")
    with pytest.raises(ValueError, match=message):
        by_operation(score, [4], fraction, "highest", 1, "auto")
