from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepo.data import all_positions, random_positions, select_positions
from sepo.data.selection import count_selected, random_mask, weighted_positions
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


def test_a_random_mask_depends_on_seed_and_key_only():
    first = random_mask(4000, seed=1, key="7/chosen/mask")
    assert first.dtype == np.float32 and 0 <= first.min() <= first.max() < 1
    assert np.array_equal(first, random_mask(4000, seed=1, key="7/chosen/mask"))
    assert not np.array_equal(first, random_mask(4000, seed=1, key="7/rejected/mask"))
    assert not np.array_equal(first, random_mask(4000, seed=2, key="7/chosen/mask"))
    assert abs(np.histogram(first, 4, (0, 1))[0] - 1000).max() < 140  # binomial: sigma 27
    # fixed values, as above
    assert random_mask(3, seed=0, key="a").astype(float).round(4).tolist() == [
        0.0184,
        0.5188,
        0.7785,
    ]


def test_all_and_weighted():
    assert all_positions(3).tolist() == [0, 1, 2]
    assert weighted_positions(np.array([0, 0.5, 0, 2], np.float32)).tolist() == [1, 3]


# --- a share of the score ------------------------------------------------------------------------


@given(
    # quarters: sums are exact, so sets that hold exactly the share occur and ties are frequent
    st.lists(st.integers(-6, 6), min_size=1, max_size=8),
    st.sampled_from([0.25, 0.5, 0.75, 0.8, 1.0]),
    st.sampled_from(["highest", "lowest"]),
)
def test_mass_is_the_smallest_of_all_sets_that_hold_it(values, mass, side):
    sign = 1 if side == "highest" else -1
    gain = [max(0, sign * v) / 4 for v in values]
    sets = [set(c) for k in range(len(values) + 1) for c in combinations(range(len(values)), k)]
    holds = [s for s in sets if s and sum(gain[t] for t in s) >= mass * sum(gain) - 1e-12]
    fewest = [s for s in holds if len(s) == min(map(len, holds))]
    # of those the one that holds most, by the raw scores where nothing is positive; then earlier
    best = max(fewest, key=lambda s: (sum(sign * values[t] for t in s), [-t for t in sorted(s)]))
    got = select_positions(np.array(values, np.float32) / 4, "mass", side, mass=mass)
    assert got.tolist() == sorted(best)


def test_a_share_held_exactly_needs_no_further_token():
    thirds = np.array([0.7, 0.1, 0.1, 0.1], np.float32)
    held = np.cumsum(thirds, dtype=np.float64)
    assert held[0] < 0.7 * held[-1]  # what a plain comparison says: 0.7 was rounded down
    assert select_positions(thirds, "mass", "highest", mass=0.7).tolist() == [0]
    assert select_positions(thirds, "mass", "highest", mass=0.7001).tolist() == [0, 1]


def test_mass_of_a_response_without_a_positive_score_is_its_best_token():
    score = np.array([-3, -1, -1, -2], np.float32)
    assert select_positions(score, "mass", "highest").tolist() == [1]
    assert select_positions(-score, "mass", "lowest").tolist() == [1]
    assert select_positions(np.zeros(3, np.float32), "mass", "highest").tolist() == [0]


def test_mass_leaves_the_other_sign_out():
    score = np.array([1, -50, 1, 0, -50], np.float32)
    assert select_positions(score, "mass", "highest", mass=1.0).tolist() == [0, 2]
    assert select_positions(score, "mass", "lowest").tolist() == [1, 4]


@pytest.mark.parametrize("mass", [0.0, -1, 1.1, np.nan])
def test_mass_out_of_range(mass):
    with pytest.raises(InputError, match=f"expected 0 < mass <= 1, got {mass}"):
        select_positions(np.ones(3, np.float32), "mass", "highest", mass=mass)


# --- the released code's selection ---------------------------------------------------------------


def released(score, fraction, side):
    """Counted and taken as there: by repeated argmax over the scores of all tokens but the first."""
    left = (score if side == "highest" else -score)[1:].copy()
    taken = []
    while len(taken) < int(fraction * len(left)):
        taken.append(int(left.argmax()))
        left[taken[-1]] = -100000
    return sorted(t + 1 for t in taken)


@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=40),
    st.sampled_from([0.1, 0.29, 0.3, 0.5, 0.57, 1.0]),
    st.sampled_from(["highest", "lowest"]),
)
def test_official_is_what_the_released_code_selects(values, fraction, side):
    score = np.array(values, np.float32)
    got = select_positions(score, fraction, side, first_token="released").tolist()
    expected = released(score, fraction, side)
    if expected:
        assert got == expected
    else:  # it would divide by zero
        order = sorted(
            range(1, len(values)), key=lambda t: -values[t] if side == "highest" else values[t]
        )
        assert got == order[:1]


def test_official_counts():
    count = lambda T, k: count_selected(T, k, first_token="released")
    assert [count(T, 0.3) for T in (1, 2, 3, 4, 7, 10, 11, 12)] == [1, 1, 1, 1, 1, 2, 3, 3]
    assert count(101, 0.29) == 28  # no 1e-9 there


def test_official_takes_the_only_token():
    assert select_positions(np.ones(1, np.float32), 0.3, "highest", first_token="released") == [0]
    assert random_positions(1, 0.3, seed=0, key="a", first_token="released") == [0]


def test_official_with_mass_and_at_random_leaves_the_first_token_out():
    score = np.array([9, 1, 3, -1], np.float32)
    how = dict(first_token="released")
    assert select_positions(score, "mass", "highest", mass=0.75, **how).tolist() == [2]
    draws = [random_positions(11, 0.3, seed=s, key="a", **how) for s in range(100)]
    assert {len(d) for d in draws} == {3} and {*np.concatenate(draws)} == {*range(1, 11)}


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.01, np.nan])
def test_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match=f"expected 0 < fraction <= 1, got {fraction}"):
        select_positions(np.ones(3, np.float32), fraction, "highest")


def test_nothing_can_be_drawn_by_mass():
    with pytest.raises(InputError, match="expected 0 < fraction <= 1, got mass"):
        random_positions(3, "mass", seed=0, key="a")


def test_nan_score():
    with pytest.raises(InputError, match="NaN at position 1"):
        select_positions(np.array([0, np.nan], np.float32), 0.5, "highest")
