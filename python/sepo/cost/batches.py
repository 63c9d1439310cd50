"""Seconds to plan a million pairs, and how full and how even the steps are.

The lengths are those of a data set in a model's tokens, drawn again and again until there are
enough. full: tokens of the step over what all its micro-batches could hold; but last: the same
without the last micro-batch of each rank, which holds what a fixed step leaves. ranks: what the
dearest rank costs over the mean of the ranks. in step: the same for ranks that wait for each other
after every micro-batch, as FSDP's do.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sepo.cost.decoder import named
from sepo.data.cost import pair_costs
from sepo.data.plan import StepPlan, num_steps, plan_step
from sepo.data.read.read import read_pairs
from sepo.model.load import load_tokenizer
from sepo.terminal import say

STEP = 128  # pairs


def show(
    data: str,
    model: str,  # a folder with a tokenizer and a config
    *,
    max_length: int | None = None,  # tokens of the prompt and one response
    pairs: int = 1_000_000,  # lengths to plan
    steps: int = 200,  # whose fill and balance are looked at
    budgets: Sequence[int] = (2048, 4096, 8192, 16384),  # tokens of a micro-batch
    world_sizes: Sequence[int] = (1, 2, 8),
) -> None:
    """Print both tables. Raises InputError as reading the data and the model's config do."""
    decoder = named(model)
    # FLOP of one query and key over those of a token, as sepo.data.cost has them of a model
    attention = 4 * decoder.query_width * decoder.layers / (2 * decoder.weights)
    found = read_pairs(data, load_tokenizer(model), max_length=max_length).pairs
    parts = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in found])
    parts = parts[np.random.default_rng(0).integers(0, len(parts), pairs)]
    lengths, costs = parts.sum(1), pair_costs(*parts.T, attention=attention)
    say(
        f"{data}: {len(found)} pairs of {lengths.min()} to {lengths.max()} tokens, "
        f"median {np.median(lengths):.0f}"
    )
    fitting = [budget for budget in budgets if budget >= lengths.max()]
    for left_out in sorted({*budgets} - {*fitting}):
        print(f"budget {left_out}: left out, the longest pair has {lengths.max()} tokens")
    print(f"\n{pairs} pairs, seconds{'one step':>14}{f'steps of {STEP}':>16}")
    for budget in fitting:
        for world_size in world_sizes:
            case: dict[str, Any] = dict(
                max_tokens=budget, seed=0, world_size=world_size, costs=costs
            )
            seconds = [planning_seconds(lengths, size, **case) for size in (len(lengths), STEP)]
            print(f"budget {budget:6} ranks {world_size:2}{seconds[0]:15.2f}{seconds[1]:16.2f}")
    print(
        f"\nmedian of {steps} steps (worst)"
        f"{'micro-batches':>15}{'full':>8}{'but last':>10}{'ranks':>18}{'in step':>18}"
    )
    for budget in fitting:
        for world_size in world_sizes:
            for per_step in sorted({16 * world_size, 64 * world_size}):
                case = dict(max_tokens=budget, seed=0, world_size=world_size, costs=costs)
                few = min(steps, num_steps(len(lengths), per_step))
                plans = (
                    plan_step(lengths, step=step, pairs_per_step=per_step, **case)
                    for step in range(few)
                )
                rows = np.array([measures(plan, lengths, costs, budget) for plan in plans])
                known = [column[~np.isnan(column)] for column in rows.T]
                count, full, but_last, ranks, in_step = (
                    np.median(column) if len(column) else np.nan for column in known
                )
                but_last = "-" if np.isnan(but_last) else f"{but_last:.1%}"
                _, _, _, worst_ranks, worst_in_step = rows.max(0)
                print(
                    f"budget {budget:6} ranks {world_size:2} pairs {per_step:4}{count:12.0f}{full:8.1%}"
                    f"{but_last:>10}{ranks:10.4f} ({worst_ranks:.3f}){in_step:9.4f} "
                    f"({worst_in_step:.3f})"
                )


def planning_seconds(lengths: np.ndarray, pairs_per_step: int, **case) -> float:
    """Seconds for every step of an epoch."""
    start = time.perf_counter()
    for step in range(num_steps(len(lengths), pairs_per_step)):
        plan_step(lengths, step=step, pairs_per_step=pairs_per_step, **case)
    return time.perf_counter() - start


def measures(
    plan: StepPlan,
    lengths: np.ndarray,  # (pairs in the data set,)
    costs: np.ndarray,  # (pairs in the data set,)
    budget: int,
) -> tuple[float, ...]:
    """Micro-batches a rank, and the four measures that the module describes.

    "But last" is nan where every rank has one micro-batch.
    """
    sums = lambda values: np.array(
        [[values[list(part)].sum() for part in rank] for rank in plan.micro_batches]
    )
    tokens, cost = sums(lengths), sums(costs)  # (ranks, micro-batches)
    count, mean = tokens.shape[1], cost.sum() / len(cost)
    fullest_first = -np.sort(-tokens, axis=1)
    but_last = fullest_first[:, :-1].mean() / budget if count > 1 else np.nan
    return (
        count,
        tokens.mean() / budget,
        but_last,
        cost.sum(1).max() / mean,
        cost.max(0).sum() / mean,
    )
