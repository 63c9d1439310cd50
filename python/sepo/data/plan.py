"""Which pairs a step trains on, and in which micro-batches and ranks they travel.

The plan follows from lengths, costs, seed and step number alone: every rank computes the same one
without communication, and "resume" means "continue at step n".
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heapreplace
from itertools import pairwise

import numpy as np

# what the dearest rank may cost over the mean for the sake of one micro-batch less
BALANCE = 1.05


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step, the same on every rank."""

    pairs: np.ndarray  # (pairs in the step,) int64 indices into the data set
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> pair indices;
    # every rank has equally many, the dearest first, the spare ones empty: so collectives match,
    # and ranks that wait for each other in every micro-batch wait for one that costs the same


def num_steps(num_pairs: int, pairs_per_step: int) -> int:
    """Steps of one epoch. The last one holds what is left; its loss divides by its own count."""
    return -(-num_pairs // pairs_per_step)


def plan_step(
    lengths: np.ndarray,  # (pairs in the data set,) int64 tokens to read of each pair
    *,
    step: int,  # optimiser step since the start of training, 0-based
    pairs_per_step: int,
    max_tokens: int | None,  # token budget of a micro-batch; None: a rank's share in one
    seed: int,
    world_size: int = 1,
    shuffle: bool = True,
    costs: np.ndarray | None = None,  # (pairs in the data set,) float64 cost of each pair in
    # tokens through the trunk, as `pair_costs` gives it; None: the lengths
) -> StepPlan:
    """Plan step `step`: shuffled over the whole epoch, ranks of equal cost, few micro-batches.

    A pair never straddles two micro-batches. Raises ValueError if one of the step's pairs is
    longer than `max_tokens`, or if there is not one cost a pair.
    """
    if costs is not None and costs.shape != lengths.shape:
        raise ValueError(f"expected costs of shape {lengths.shape}, got {costs.shape}")
    pairs = _pairs_of_step(len(lengths), step, pairs_per_step, seed if shuffle else None)
    longest_first = pairs[np.argsort(-lengths[pairs], kind="stable")]
    tokens = lengths[longest_first]
    cost = tokens if costs is None else costs[longest_first]
    if max_tokens is None:
        bin_of, rank_of_bin = _deal(cost, world_size), np.arange(world_size)
    elif tokens[0] <= max_tokens:
        bin_of, rank_of_bin = _pack(tokens, cost, max_tokens, world_size)
    else:
        raise ValueError(
            f"expected max_tokens >= {tokens[0]}, the longest pair (index {longest_first[0]}), "
            f"got {max_tokens}"
        )
    return StepPlan(pairs, _line_up(longest_first, cost, bin_of, rank_of_bin, world_size))


def best_fit_decreasing(
    lengths: Sequence[int],  # descending
    budget: int,  # at least the longest length
) -> list[int]:  # the bin of each length, numbered in the order they are opened
    """Each item goes to the bin where it leaves the least room, else to a new one.

    Among bins of equal room it goes to the one that was added to last.
    """
    bin_of: list[int] = []
    num_bins = 0
    by_room: dict[int, list[int]] = {}  # tokens left -> bins, the one added to last at the end
    rooms: list[int] = []  # the keys of by_room, ascending
    lengths = [*lengths, 0]  # the last ends a run of equal lengths, and nothing is shorter
    smallest = lengths[-2] if len(lengths) > 1 else 0
    i = 0
    while i < len(lengths) - 1:
        size = lengths[i]
        tightest = bisect_left(rooms, size)
        if tightest < len(rooms):
            room = rooms[tightest]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[tightest]
        else:
            room, number = budget, num_bins
            num_bins += 1
        # the tightest bin stays the tightest for another item of the same length while it fits:
        # among a million items, most have the length of the one before and need no search
        while lengths[i] == size <= room:
            room -= size
            bin_of.append(number)
            i += 1
        if room < smallest:
            continue  # full: out of the way of the searches to come
        if room in by_room:
            by_room[room].append(number)
        else:
            by_room[room] = [number]
            insort(rooms, room)
    return bin_of


def _pairs_of_step(
    num_pairs: int,
    step: int,
    pairs_per_step: int,
    seed: int | None,  # None: in the order of the data
) -> np.ndarray:  # (pairs in the step,) int64
    epoch, step_in_epoch = divmod(step, num_steps(num_pairs, pairs_per_step))
    start = step_in_epoch * pairs_per_step
    stop = min(start + pairs_per_step, num_pairs)
    return np.arange(start, stop) if seed is None else _order(num_pairs, seed, epoch)[start:stop]


@lru_cache(maxsize=4)
def _order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)


def _pack(
    tokens: np.ndarray,  # (n,) int64, descending
    cost: np.ndarray,  # (n,)
    budget: int,
    world_size: int,
) -> tuple[np.ndarray, np.ndarray]:  # bin of each pair (n,), rank of each bin (bins,)
    """Pairs to ranks by cost, then best fit in each; or best fit first, where that takes fewer."""
    rank_of = _deal(cost, world_size)
    counts: list[int] = []
    bin_of = np.empty(len(tokens), np.int64)
    for rank in range(world_size):
        mine = np.flatnonzero(rank_of == rank)
        found = best_fit_decreasing(tokens[mine].tolist(), budget)
        bin_of[mine] = np.array(found, np.int64) + sum(counts)
        counts.append(max(found, default=-1) + 1)
    apart = bin_of, np.repeat(np.arange(world_size), counts)
    if world_size == 1 or (max(counts) - 1) * world_size * budget < tokens.sum():
        return apart  # nothing takes fewer
    bin_of = np.array(best_fit_decreasing(tokens.tolist(), budget))
    bin_cost = np.bincount(bin_of, weights=cost)
    fewest = -(-len(bin_cost) // world_size)
    if fewest >= max(counts):
        return apart
    rank_of_bin = _deal(bin_cost, world_size, most=fewest)
    dearest = np.bincount(rank_of_bin, weights=bin_cost).max()
    # added up in order, as bincount does: NumPy's own sum may round differently on another CPU,
    # and two ranks that decide differently wait for each other for ever
    loads = np.bincount(rank_of, weights=cost).tolist()
    limit = max(*loads, BALANCE * sum(loads) / world_size)
    return (bin_of, rank_of_bin) if dearest <= limit else apart


def _deal(
    cost: np.ndarray,  # (n,)
    world_size: int,
    *,
    most: int | None = None,  # things a rank may hold
) -> np.ndarray:  # (n,) int64 rank of each
    """The dearest first, each to the rank that has cost least so far."""
    if world_size == 1:
        return np.zeros(len(cost), np.int64)
    dearest_first = np.argsort(-cost, kind="stable")
    loads = [(0, rank) for rank in range(world_size)]  # a heap
    free = [len(cost) if most is None else most] * world_size
    ranks = []
    for dearest in cost[dearest_first].tolist():
        load, rank = loads[0]
        ranks.append(rank)
        free[rank] -= 1
        if free[rank]:
            heapreplace(loads, (load + dearest, rank))
        else:
            heappop(loads)
    rank_of = np.empty(len(cost), np.int64)
    rank_of[dearest_first] = ranks
    return rank_of


def _line_up(
    pairs: np.ndarray,  # (n,) int64 indices into the data set
    cost: np.ndarray,  # (n,)
    bin_of: np.ndarray,  # (n,) int64
    rank_of_bin: np.ndarray,  # (bins,) int64
    world_size: int,
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Each rank's dearest micro-batch first, then empty ones until all have equally many."""
    num_bins = len(rank_of_bin)
    bin_cost = np.bincount(bin_of, weights=cost, minlength=num_bins)
    bins = np.lexsort((-bin_cost, rank_of_bin))  # rank by rank, the dearest first
    place = np.empty(num_bins, np.int64)
    place[bins] = np.arange(num_bins)
    travellers = pairs[np.argsort(place[bin_of], kind="stable")].tolist()
    ends = np.cumsum(np.bincount(bin_of, minlength=num_bins)[bins]).tolist()
    parts = [tuple(travellers[start:end]) for start, end in pairwise([0, *ends])]
    counts = np.bincount(rank_of_bin, minlength=world_size)
    ends, most = np.cumsum(counts).tolist(), int(counts.max())
    return tuple(
        (*parts[start:end], *[()] * (most - (end - start))) for start, end in pairwise([0, *ends])
    )
