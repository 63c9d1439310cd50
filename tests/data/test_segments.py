from dataclasses import replace

import numpy as np
import pytest

from sepo.data import ScoredPair, TokenPair
from sepo.data.hidden import HiddenRows
from sepo.data.segments import make_segments, num_selected, num_tokens
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
    prompt, chosen, rejected = make_segments(PAIR, "selected", fraction=0.5)
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
    _, chosen, rejected = make_segments(replace(PAIR, chosen_ref_hidden=rows), "selected")
    assert chosen.ref_hidden is rows and rejected.ref_hidden is None


def test_fractions_may_differ():
    _, chosen, rejected = make_segments(PAIR, "selected", fraction=0.25, rejected_fraction=1.0)
    assert (len(chosen.positions), len(rejected.positions)) == (1, 3)


def test_all_and_chosen():
    _, chosen, rejected = make_segments(PAIR, "all")
    assert (len(chosen.positions), len(rejected.positions)) == (4, 3)
    _, chosen, rejected = make_segments(PAIR, "chosen")
    assert len(chosen.positions) == 4
    assert len(rejected.positions) == len(rejected.response) == 0


def test_random_has_the_count_of_selected_and_ignores_scores():
    _, chosen, _ = make_segments(PAIR, "random", fraction=0.5, seed=3)
    assert len(chosen.positions) == 2
    draws = {
        tuple(make_segments(PAIR, "random", fraction=0.5, seed=s)[1].positions) for s in range(30)
    }
    assert len(draws) == 6  # every pair of the four positions turns up


@pytest.mark.parametrize("positions", ["selected", "all"])
def test_the_users_weights_replace_the_selection(positions):
    _, chosen, rejected = make_segments(WEIGHTED, positions)
    assert chosen.positions.tolist() == [1] and chosen.weights.tolist() == [2.0]
    assert rejected.positions.tolist() == [0]


def test_random_with_the_users_weights_is_refused():
    with pytest.raises(InputError, match="row w: it brings its own chosen weights"):
        make_segments(WEIGHTED, "random")


def test_missing_scores_name_the_row():
    pair = TokenPair(id="9", prompt=ids(1), chosen=ids(2), rejected=ids(3))
    with pytest.raises(InputError, match="row 9: expected a score per chosen token"):
        make_segments(pair, "selected")


def test_nan_scores_name_the_row():
    bad = replace(PAIR, rejected_score=f4(0, np.nan, 0))
    with pytest.raises(InputError, match="row row-3, rejected: .*NaN at position 1"):
        make_segments(bad, "selected")
