import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepo.data import num_steps, plan_step
from sepo.data.plan import best_fit_decreasing

cases = st.fixed_dictionaries(
    dict(
        lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60).map(np.array),
        pairs_per_step=st.integers(1, 20),
        max_tokens=st.one_of(st.none(), st.integers(1, 1000)),
        seed=st.integers(0, 5),
        world_size=st.integers(1, 4),
    )
)


@given(cases)
def test_an_epoch_holds_every_pair_once(case):
    steps = num_steps(len(case["lengths"]), case["pairs_per_step"])
    seen = []
    for step in range(steps):
        plan = plan_step(step=step, **case)
        travelled = [i for rank in plan.micro_batches for part in rank for i in part]
        assert sorted(travelled) == sorted(plan.pairs.tolist())
        seen += travelled
    assert sorted(seen) == list(range(len(case["lengths"])))


@given(cases, st.integers(0, 30))
def test_micro_batches_keep_the_budget_and_the_ranks_in_step(case, step):
    plan = plan_step(step=step, **case)
    assert len(plan.micro_batches) == case["world_size"]
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    for rank in plan.micro_batches:
        for part in rank:
            if case["max_tokens"] is not None and len(part) > 1:
                assert case["lengths"][list(part)].sum() <= case["max_tokens"]


@given(cases, st.integers(0, 30))
def test_which_pairs_does_not_depend_on_budget_or_ranks(case, step):
    plain = dict(case, max_tokens=None, world_size=1)
    assert np.array_equal(plan_step(step=step, **case).pairs, plan_step(step=step, **plain).pairs)
    again = plan_step(step=step, **case)
    assert again.micro_batches == plan_step(step=step, **case).micro_batches


def test_epochs_are_shuffled_anew_and_repeatably():
    order = lambda step, seed: plan_step(
        np.ones(100, int), step=step, pairs_per_step=100, max_tokens=None, seed=seed
    ).pairs.tolist()
    assert order(0, 0) != order(1, 0) != order(0, 1)
    assert order(3, 7) == order(3, 7)


def test_best_fit_decreasing_by_hand():
    lengths = np.array([4, 8, 1, 4, 2, 1])
    assert best_fit_decreasing(np.arange(6), lengths, 10) == [[1, 4], [0, 3, 2, 5]]


def test_a_pair_over_the_budget_travels_alone():
    assert best_fit_decreasing(np.arange(3), np.array([50, 3, 4]), 10) == [[0], [2, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_a_budget_a_rank_has_about_its_share(world_size):
    lengths = np.full(16, 100)
    plan = plan_step(
        lengths, step=0, pairs_per_step=16, max_tokens=None, seed=0, world_size=world_size
    )
    loads = [sum(len(part) for part in rank) for rank in plan.micro_batches]
    assert loads == [16 // world_size] * world_size
