from dataclasses import replace

import numpy as np
import pytest

from sepo.data import ScoredPair, TokenPair
from sepo.data.hidden import HiddenRows
from sepo.data.segments import make_segments, num_selected, num_tokens
from sepo.data.selection import Selection
from sepo.errors import InputError

ids = lambda *values: np.array(values, np.int32)
f4 = lambda *values: np.array(values, np.float32)
PAIR = ScoredPair(
    id="row-3",
    prompt=ids(1, 2),
    chosen=ids(10, 11, 12, 13),
    rejected=ids(20, 21, 22),
    chosen_score=f4(0.1, 0.9, 0.2, 0.3),
    rejected_score=f4(0.5, -0.5, 0.1),
    chosen_ref_logp=f4(-1, -2, -3, -4),
    rejected_ref_logp=f4(-5, -6, -7),
)
WEIGHTED = TokenPair(
    id="w",
    prompt=ids(1),
    chosen=ids(10, 11, 12),
    rejected=ids(20, 21),
    chosen_weight=f4(0, 2, 0),
    rejected_weight=f4(1, 0),
)


def test_selected_takes_high_of_chosen_and_low_of_rejected():
    prompt, chosen, rejected = make_segments(PAIR, Selection("selected", fraction=0.5))
    assert prompt is PAIR.prompt
    assert chosen.positions.tolist() == [1, 3] and chosen.targets.tolist() == [11, 13]
    assert chosen.response.tolist() == [10, 11, 12]  # the last target is never an input
    assert rejected.positions.tolist() == [1] and rejected.response.tolist() == [20]
    assert chosen.ref_logp.tolist() == [-2, -4]
    assert num_tokens((prompt, chosen, rejected)) == 6
    assert num_selected((prompt, chosen, rejected)) == 3


def test_hidden_rows_stay_a_handle():
    class Unread:
        def __getitem__(self, where):
            raise AssertionError("a row was read")

    rows = HiddenRows(Unread(), 5, 4)
    _, chosen, rejected = make_segments(
        replace(PAIR, chosen_ref_hidden=rows), Selection("selected")
    )
    assert chosen.ref_hidden is rows and rejected.ref_hidden is None


def test_fractions_may_differ():
    _, chosen, rejected = make_segments(
        PAIR, Selection("selected", fraction=0.25, rejected_fraction=1.0)
    )
    assert (len(chosen.positions), len(rejected.positions)) == (1, 3)


def test_one_side_may_go_by_mass():
    # chosen 0.1 0.9 0.2 0.3: 0.9 of 1.5 is 60 %; rejected 0.5 -0.5 0.1: -0.5 holds all
    count = lambda **how: [
        len(s.positions) for s in make_segments(PAIR, Selection("selected", **how))[1:]
    ]
    assert count(fraction="mass", mass=0.6) == [1, 1]
    assert count(fraction="mass", mass=0.9, rejected_fraction=1.0) == [3, 3]
    assert count(fraction=1.0, rejected_fraction="mass") == [4, 1]


def test_official_leaves_the_first_token_out_on_both_sides():
    how = dict(fraction=1.0, first_token="released")
    for positions in ("selected", "random"):
        _, chosen, rejected = make_segments(PAIR, Selection(positions, **how))
        assert chosen.positions.tolist() == [1, 2, 3] and rejected.positions.tolist() == [1, 2]
    assert len(make_segments(PAIR, Selection("all", first_token="released"))[1].positions) == 4


@pytest.mark.parametrize("positions", ["selected", "random"])
@pytest.mark.parametrize(
    ("how", "side"), [(dict(rejected_fraction=0), "rejected"), (dict(fraction=0), "chosen")]
)
def test_no_token_of_one_side_names_it(positions, how, side):
    with pytest.raises(InputError, match=f"pair row-3, {side}: expected 0 < fraction <= 1, got 0"):
        make_segments(PAIR, Selection(positions, **{"rejected_fraction": 0.5, **how}))


def test_sepo_rand_is_fixed_by_seed_and_id_alone():
    """Not by the row's place, its tokens' values, its scores or what was drawn before."""
    draw = lambda pair: [
        s.positions.tolist()
        for s in make_segments(pair, Selection("random", fraction=0.5, seed=7))[1:]
    ]
    alone = draw(PAIR)
    pairs = [replace(PAIR, id=str(i)) for i in range(20)]
    forward = {pair.id: draw(pair) for pair in pairs}
    assert {pair.id: draw(pair) for pair in reversed(pairs)} == forward
    assert draw(PAIR) == alone
    other = replace(PAIR, prompt=ids(9), chosen=PAIR.chosen + 5, chosen_score=-PAIR.chosen_score)
    assert draw(other) == alone
    # fixed values: another process or machine must draw the same
    assert alone == [[1, 2], [1]]


def test_all_and_chosen():
    _, chosen, rejected = make_segments(PAIR, Selection("all"))
    assert (len(chosen.positions), len(rejected.positions)) == (4, 3)
    _, chosen, rejected = make_segments(PAIR, Selection("chosen"))
    assert len(chosen.positions) == 4
    assert len(rejected.positions) == len(rejected.response) == 0


def test_random_has_the_count_of_selected_and_ignores_scores():
    _, chosen, _ = make_segments(PAIR, Selection("random", fraction=0.5, seed=3))
    assert len(chosen.positions) == 2
    draws = {
        tuple(make_segments(PAIR, Selection("random", fraction=0.5, seed=s))[1].positions)
        for s in range(30)
    }
    assert len(draws) == 6  # every pair of the four positions turns up


def test_a_random_mask_is_of_the_token_whatever_is_selected():
    draw = lambda *how, **more: make_segments(PAIR, Selection(*how, mask="random", **more))
    _, chosen, rejected = draw("all", seed=3)
    assert chosen.mask.shape == (4,) and rejected.mask.shape == (3,)
    assert len({*chosen.mask.tolist(), *rejected.mask.tolist()}) == 7
    _, some, _ = draw("selected", fraction=0.5, seed=3)
    assert some.mask.tolist() == chosen.mask[[1, 3]].tolist()
    assert draw("all", seed=4)[1].mask.tolist() != chosen.mask.tolist()
    other = make_segments(replace(PAIR, id="row-4"), Selection("all", mask="random", seed=3))
    assert other[1].mask.tolist() != chosen.mask.tolist()
    # SePO-rand's draw is another one: the selected tokens are not those of a high mask
    _, drawn, _ = draw("random", fraction=0.5, seed=3)
    assert drawn.mask.tolist() == chosen.mask[drawn.positions].tolist()
    assert (
        drawn.positions.tolist()
        == make_segments(PAIR, Selection("random", fraction=0.5, seed=3))[1].positions.tolist()
    )
    assert make_segments(PAIR, Selection("all"))[1].mask is None


@pytest.mark.parametrize("positions", ["selected", "all", "chosen"])
def test_the_users_weights_replace_the_selection(positions):
    _, chosen, rejected = make_segments(WEIGHTED, Selection(positions))
    assert chosen.positions.tolist() == [1] and chosen.weights.tolist() == [2.0]
    assert rejected.positions.tolist() == ([] if positions == "chosen" else [0])


def test_the_users_weights_on_one_side_leave_the_other_to_its_scores():
    half = replace(PAIR, chosen_weight=f4(0, 0, 0.5, 0))
    _, chosen, rejected = make_segments(half, Selection("selected", fraction=0.4))
    assert chosen.positions.tolist() == [2] and chosen.weights.tolist() == [0.5]
    assert rejected.positions.tolist() == [1] and rejected.weights is None
    assert len(make_segments(half, Selection("all"))[2].positions) == 3


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (f4(0, 1), "to hold 3 numbers, one a token, got 2"),
        (f4(0, -1, 2), "to be finite and >= 0, got -1.0"),
        (f4(0, np.nan, 2), "to be finite and >= 0, got nan"),
        (f4(0, 1, np.inf), "to be finite and >= 0, got inf"),
        (f4(0, 0, 0), "to select a token, got zeros alone"),
    ],
)
@pytest.mark.parametrize("positions", ["selected", "all", "chosen"])
def test_weights_that_cannot_be_used_name_the_row(positions, weight, message):
    with pytest.raises(InputError, match=f"pair w: expected chosen_weight {message}"):
        make_segments(replace(WEIGHTED, chosen_weight=weight), Selection(positions))


def test_random_with_the_users_weights_is_refused():
    with pytest.raises(InputError, match="pair w: it brings its own chosen weights"):
        make_segments(WEIGHTED, Selection("random"))


def test_missing_scores_name_the_row():
    pair = TokenPair(id="9", prompt=ids(1), chosen=ids(2), rejected=ids(3))
    with pytest.raises(InputError, match="pair 9: expected a score per chosen token"):
        make_segments(pair, Selection("selected"))


def test_nan_scores_name_the_row():
    bad = replace(PAIR, rejected_score=f4(0, np.nan, 0))
    with pytest.raises(InputError, match="pair row-3, rejected: .*NaN at position 1"):
        make_segments(bad, Selection("selected"))
