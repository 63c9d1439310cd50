"""Which pairs a step trains on, and in which micro-batches and ranks they travel.

The plan follows from lengths, seed and step number alone: every rank computes the same one without
communication, and "resume" means "continue at step n".
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step, the same on every rank."""

    pairs: np.ndarray  # (pairs in the step,) int64 indices into the data set
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> pair indices;
    # every rank has equally many micro-batches, the spare ones empty, so collectives match


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
) -> StepPlan:
    """Plan step `step`: shuffled over the whole epoch, then best-fit-decreasing into micro-batches.

    A pair never straddles two micro-batches; one longer than `max_tokens` travels alone.
    """
    epoch, step_in_epoch = divmod(step, num_steps(len(lengths), pairs_per_step))
    order = _epoch_order(len(lengths), seed, epoch) if shuffle else np.arange(len(lengths))
    pairs = order[step_in_epoch * pairs_per_step :][:pairs_per_step]
    total = int(lengths[pairs].sum())
    # without a budget the fairest share of a rank is the budget
    budget = max_tokens if max_tokens is not None else max(1, -(-total // world_size))
    if max_tokens is None and world_size == 1:
        bins = [list(pairs)]
    else:
        bins = best_fit_decreasing(pairs, lengths, budget)
    return StepPlan(pairs, _deal(bins, lengths, world_size))


def best_fit_decreasing(
    pairs: np.ndarray,  # (n,) int64 indices into lengths
    lengths: np.ndarray,
    budget: int,
) -> list[list[int]]:
    """Bins of at most `budget` tokens; an item over the budget has a bin of its own."""
    bins, room = [], np.empty(len(pairs), np.int64)
    for pair in sorted(pairs.tolist(), key=lambda i: (-lengths[i], i)):
        slack = room[: len(bins)] - lengths[pair]
        fits = np.flatnonzero(slack >= 0)
        if len(fits):
            best = fits[slack[fits].argmin()]
            bins[best].append(pair)
        else:
            best = len(bins)
            bins.append([pair])
            room[best] = budget
        room[best] -= lengths[pair]
    return bins


def _deal(
    bins: list[list[int]], lengths: np.ndarray, world_size: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Longest bin to the least loaded rank; then empty bins until all ranks have equally many."""
    load, ranks = [0] * world_size, [[] for _ in range(world_size)]
    tokens = lambda part: int(lengths[part].sum())
    for part in sorted(bins, key=lambda part: (-tokens(part), part)):
        least = load.index(min(load))
        ranks[least].append(tuple(int(pair) for pair in part))
        load[least] += tokens(part)
    count = max(map(len, ranks))
    return tuple(tuple(rank + [()] * (count - len(rank))) for rank in ranks)


@lru_cache(maxsize=4)
def _epoch_order(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pairs)
