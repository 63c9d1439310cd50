import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepo.data import all_positions, random_positions, select_positions
from sepo.data.select import count_selected, weighted_positions
from sepo.errors import InputError


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.1, [1, 1, 1, 1, 1, 1]), (0.3, [1, 1, 1, 2, 3, 3]), (0.5, [1, 1, 2, 3, 5, 5])],
)
def test_counts(fraction, counts):
    assert [count_selected(T, fraction) for T in (1, 3, 4, 7, 10, 11)] == counts


def test_floating_point_does_not_lose_a_token():
    assert int(0.29 * 100) == 28  # what a plain floor says
    assert count_selected(100, 0.29) == 29


def test_ties_go_to_the_earlier_token():
    score = np.array([1, 2, 2, 1, 2], np.float32)
    assert select_positions(score, 0.5, "highest").tolist() == [1, 2]
    assert select_positions(score, 0.5, "lowest").tolist() == [0, 3]


def test_the_first_token_can_be_selected():
    assert select_positions(np.array([9, 1, 1, 1], np.float32), 0.25, "highest").tolist() == [0]


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
    st.sampled_from(["highest", "lowest"]),
)
def test_selected_is_what_a_sort_by_hand_selects(values, fraction, side):
    sign = -1 if side == "highest" else 1
    by_hand = sorted(range(len(values)), key=lambda t: (sign * values[t], t))
    K = max(1, int(fraction * len(values) + 1e-9))
    got = select_positions(np.array(values, np.float32), fraction, side)
    assert got.tolist() == sorted(by_hand[:K])


def test_random_positions_depend_on_seed_and_key_only():
    first = random_positions(50, 0.3, seed=1, key="7/chosen")
    assert len(first) == 15 and (np.diff(first) > 0).all()
    assert np.array_equal(first, random_positions(50, 0.3, seed=1, key="7/chosen"))
    assert not np.array_equal(first, random_positions(50, 0.3, seed=1, key="7/rejected"))
    assert not np.array_equal(first, random_positions(50, 0.3, seed=2, key="7/chosen"))
    # a fixed value: a later process, another machine or Python's hash salt must not change it
    assert random_positions(10, 0.3, seed=0, key="a").tolist() == [0, 4, 7]


def test_random_positions_are_uniform():
    counts = np.zeros(20)
    for i in range(2000):
        counts[random_positions(20, 0.3, seed=0, key=str(i))] += 1
    assert abs(counts - 600).max() < 100  # binomial: sigma 20.5


def test_all_and_weighted():
    assert all_positions(3).tolist() == [0, 1, 2]
    assert weighted_positions(np.array([0, 0.5, 0, 2], np.float32)).tolist() == [1, 3]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match="expected 0 < fraction <= 1"):
        select_positions(np.ones(3, np.float32), fraction, "highest")


def test_nan_score():
    with pytest.raises(InputError, match="NaN at position 1"):
        select_positions(np.array([0, np.nan], np.float32), 0.5, "highest")
