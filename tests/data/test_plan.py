import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sepo.data import num_steps, plan_step
from sepo.data.plan import BALANCE, best_fit_decreasing

cases = st.fixed_dictionaries(
    dict(
        lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60).map(np.array),
        pairs_per_step=st.integers(1, 30),
        max_tokens=st.one_of(st.none(), st.integers(400, 1000)),
        seed=st.integers(0, 5),
        world_size=st.integers(1, 4),
        shuffle=st.booleans(),
    )
)


def with_costs(case: dict) -> dict:
    """Costs that do not follow the lengths."""
    return case | {"costs": np.random.default_rng(case["seed"]).random(len(case["lengths"]))}


def real_lengths(count: int) -> np.ndarray:  # (count,) int64
    """Like real conversations cut at 512: a prompt of 36 to 480 tokens, two responses behind it."""
    rng = np.random.default_rng(0)
    prompt, chosen, rejected = np.exp(rng.normal([[5.0], [5.3], [5.5]], 1.1, (3, count)))
    prompt = np.clip(prompt, 36, 480).astype(int)
    responses = (np.minimum(x.astype(int), 512 - prompt) for x in (chosen, rejected))
    return prompt + sum(responses)


def loads(plan, values: np.ndarray) -> np.ndarray:  # (ranks, micro-batches)
    return np.array([[values[list(part)].sum() for part in rank] for rank in plan.micro_batches])


@given(cases)
def test_an_epoch_holds_every_pair_once(case):
    seen = []
    for step in range(num_steps(len(case["lengths"]), case["pairs_per_step"])):
        plan = plan_step(step=step, **case)
        travelled = [i for rank in plan.micro_batches for part in rank for i in part]
        assert sorted(travelled) == sorted(plan.pairs.tolist())
        seen += travelled
    assert sorted(seen) == list(range(len(case["lengths"])))


@given(cases, st.integers(0, 30))
def test_micro_batches_keep_the_budget_and_the_ranks_in_step(case, step):
    for given_costs in ({}, with_costs(case)):
        case = case | given_costs
        plan = plan_step(step=step, **case)
        tokens = loads(plan, case["lengths"])  # refused if ranks had unequally many
        assert len(tokens) == case["world_size"]
        if case["max_tokens"] is None:
            assert tokens.shape[1] == 1
        else:
            assert tokens.max() <= case["max_tokens"]
        cost = loads(plan, case.get("costs", case["lengths"]))
        assert (np.diff(cost) <= 1e-9).all()  # the dearest first, empty ones last


@given(cases, st.integers(0, 30))
def test_which_pairs_depends_on_seed_and_step_alone(case, step):
    plan = plan_step(step=step, **case)
    other = with_costs(case) | {"max_tokens": None, "world_size": 1}
    other["lengths"] = np.sort(case["lengths"])[::-1]  # nothing is sorted beyond one step
    assert np.array_equal(plan.pairs, plan_step(step=step, **other).pairs)
    assert plan.micro_batches == plan_step(step=step, **case).micro_batches


def test_epochs_are_shuffled_anew_and_repeatably():
    order = lambda step, seed: plan_step(
        np.ones(100, int), step=step, pairs_per_step=100, max_tokens=None, seed=seed
    ).pairs.tolist()
    assert order(0, 0) != order(1, 0) != order(0, 1)
    assert order(3, 7) == order(3, 7)


def naive_best_fit(lengths: list[int], budget: int) -> list[int]:
    rooms, touched, bin_of = [], [], []
    for turn, length in enumerate(lengths):
        fits = [b for b, room in enumerate(rooms) if room >= length]
        best = min(fits, key=lambda b: (rooms[b], -touched[b]), default=len(rooms))
        if best == len(rooms):
            rooms, touched = [*rooms, budget], [*touched, turn]
        rooms[best] -= length
        touched[best] = turn
        bin_of.append(best)
    return bin_of


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 90))
@example([], 1)
def test_best_fit_decreasing_is_the_naive_one(lengths, budget):
    lengths.sort(reverse=True)
    assert best_fit_decreasing(lengths, budget) == naive_best_fit(lengths, budget)


def test_best_fit_decreasing_by_hand():
    assert best_fit_decreasing([8, 4, 4, 2, 1, 1], 10) == [0, 1, 1, 1, 0, 0]


@given(cases, st.integers(0, 30))
def test_no_rank_costs_more_than_its_share_and_one_pair(case, step):
    case = with_costs(case)
    plan = plan_step(step=step, **case)
    cost = case["costs"]
    mean = cost[plan.pairs].sum() / case["world_size"]
    # greedy dealing: before its last pair the dearest rank was the cheapest, so below the mean
    limit = max(mean + cost[plan.pairs].max(), BALANCE * mean)
    assert loads(plan, cost).sum(1).max() <= limit + 1e-9


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("max_tokens", [2048, 4096, 8192, None])
def test_sixteen_pairs_a_rank_are_balanced(world_size, max_tokens):
    lengths = real_lengths(16 * 200)
    costs = lengths + 3e-4 * (lengths / 2.0) ** 2
    case = dict(pairs_per_step=16 * world_size, max_tokens=max_tokens, world_size=world_size)
    for step in range(num_steps(len(lengths), 16 * world_size)):
        cost = loads(plan_step(lengths, step=step, seed=0, costs=costs, **case), costs).sum(1)
        assert cost.max() <= 1.05 * cost.mean()


@pytest.mark.parametrize("world_size", [1, 8])
def test_large_steps_are_full(world_size):
    lengths = real_lengths(20_000)
    plan = plan_step(
        lengths, step=0, pairs_per_step=20_000, max_tokens=8192, seed=0, world_size=world_size
    )
    tokens = loads(plan, lengths)
    assert tokens.sum() / tokens.size >= 0.99 * 8192


@pytest.mark.parametrize(
    "lengths, micro_batches",
    [
        # dealt by cost 8 5 | 6 6 5, where the second rank needs three; best fit: 8, 6, 6, 5 5
        ([8, 6, 6, 5, 5], [[10, 6], [8, 6]]),
        # the same with 17 a rank; best fit's 8, 6 4, 6, 5 5 makes 18 and 16, more than 5 % over
        ([8, 6, 6, 5, 5, 4], [[9, 8, 0], [6, 6, 5]]),
    ],
)
def test_a_micro_batch_less_is_worth_five_percent(lengths, micro_batches):
    lengths = np.array(lengths)
    plan = plan_step(
        lengths, step=0, pairs_per_step=9, max_tokens=10, seed=0, world_size=2, shuffle=False
    )
    assert loads(plan, lengths).tolist() == micro_batches


@given(cases, st.integers(0, 30))
def test_a_micro_batch_more_than_best_fit_only_for_balance(case, step):
    case = with_costs(case) | {"max_tokens": 500}
    plan = plan_step(step=step, **case)
    bins = best_fit_decreasing(sorted(case["lengths"][plan.pairs].tolist(), reverse=True), 500)
    fewest = -(-(max(bins) + 1) // case["world_size"])
    cost = loads(plan, case["costs"])
    if cost.shape[1] > fewest:  # then the ranks are what costs alone make of them
        alone = plan_step(step=step, **case | {"max_tokens": None})
        assert cost.sum(1) == pytest.approx(loads(alone, case["costs"]).sum(1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_a_budget_a_rank_has_its_share(world_size):
    lengths = np.full(16, 100)
    plan = plan_step(
        lengths, step=0, pairs_per_step=16, max_tokens=None, seed=0, world_size=world_size
    )
    assert [[len(part) for part in rank] for rank in plan.micro_batches] == [
        [16 // world_size]
    ] * world_size


@pytest.mark.parametrize("max_tokens", [None, 10])
def test_a_rank_without_a_pair_has_an_empty_micro_batch(max_tokens):
    plan = plan_step(
        np.array([5]), step=0, pairs_per_step=4, max_tokens=max_tokens, seed=0, world_size=3
    )
    assert plan.micro_batches == (((0,),), ((),), ((),))


def test_a_pair_over_the_budget_is_refused():
    lengths = np.array([3, 50, 4])
    with pytest.raises(
        ValueError, match=r"expected max_tokens >= 50, the longest pair \(index 1\), got 49"
    ):
        plan_step(lengths, step=0, pairs_per_step=3, max_tokens=49, seed=0)
    assert plan_step(lengths, step=0, pairs_per_step=3, max_tokens=50, seed=0).pairs.size == 3


def test_one_cost_a_pair():
    with pytest.raises(ValueError, match=r"expected costs of shape \(3,\), got \(2,\)"):
        plan_step(np.ones(3, int), step=0, pairs_per_step=3, max_tokens=9, seed=0, costs=np.ones(2))
