"""The study of granularity: which tokens a loss reads, with data, model and optimiser the same."""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from frontier_grid import Run, Scale

DRAWS = 2000  # of the bootstrap


class Kind(NamedTuple):
    """One loss on one choice of tokens: a result a seed, as far as they are whole."""

    loss: str
    tokens: str
    seeds: list[int]
    reward: np.ndarray  # (seeds, openings), mean over an opening's samples
    kl: np.ndarray  # (seeds, openings), nats a response


def kinds_of(
    kinds: dict[tuple[str, str], list[Run]], results: dict[str, dict], scale: Scale
) -> list[Kind]:
    """Those of which at least one seed is whole, in the order given."""
    found = []
    for (loss, tokens), runs in kinds.items():
        whole = [run for run in runs if run.name in results]
        if not whole:
            continue
        of = lambda key, each, whole=whole: np.array(
            [np.reshape(results[run.name][key], (-1, each)).mean(1) for run in whole]
        )
        seeds = [run.arguments["seed"] for run in whole]
        rewards, kls = of("rewards", scale.per_opening), of("kls", scale.kl_per_opening)
        found.append(Kind(loss, tokens, seeds, rewards, kls))
    return found


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:  # (seeds, openings)
    """The mean and its 95 % interval: a bootstrap that draws seeds and openings, crossed."""
    rng = np.random.default_rng(0)
    seeds, openings = values.shape
    drawn = [
        values[rng.integers(0, seeds, seeds)][:, rng.integers(0, openings, openings)].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def beyond_all(kind: Kind, kinds: list[Kind]) -> tuple[float, float, float] | None:
    """Sentiment minus that of the same loss on all tokens, opening by opening and seed by seed."""
    base = next((k for k in kinds if k.loss == kind.loss and k.tokens == "all"), None)
    if base is None or base.tokens == kind.tokens:
        return None
    both = [seed for seed in kind.seeds if seed in base.seeds]
    if not both:
        return None
    at = lambda of: of.reward[[of.seeds.index(seed) for seed in both]]
    return mean_interval(at(kind) - at(base))


def granularity_table(kinds: list[Kind]) -> str:
    lines = [
        "| loss | tokens | seeds | sentiment | more than on all tokens | KL, nats a response |",
        "|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        difference = beyond_all(kind, kinds)
        more = "" if difference is None else shown(difference, 3, sign="+")
        lines.append(
            f"| {kind.loss} | {kind.tokens} | {', '.join(map(str, kind.seeds))} | "
            f"{shown(mean_interval(kind.reward), 3)} | {more} | {shown(mean_interval(kind.kl), 2)} |"
        )
    return "\n".join(lines)


def draw_granularity(kinds: list[Kind], file: Path) -> None:
    """Sentiment and divergence of each kind with their intervals, and every seed beside them."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 0.8 + 0.3 * len(kinds)), sharey=True)
    losses = list(dict.fromkeys(kind.loss for kind in kinds))
    for panel, key, words in zip(
        axes, ("reward", "kl"), ("sentiment", "KL, nats a response"), strict=True
    ):
        for row, kind in enumerate(kinds):
            color, values = f"C{losses.index(kind.loss)}", getattr(kind, key)
            mean, low, high = mean_interval(values)
            panel.plot([low, high], [row, row], "-", color=color, linewidth=1)
            panel.plot(mean, row, "o", color=color, markersize=5)
            panel.plot(values.mean(1), [row + 0.2] * len(values), "|", color=color, markersize=6)
        panel.set_xlabel(words)
    axes[0].set_yticks(range(len(kinds)), [f"{kind.loss}: {kind.tokens}" for kind in kinds])
    axes[0].invert_yaxis()
    axes[1].set_xscale("log")
    figure.tight_layout()
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def shown(estimate: tuple[float, float, float], digits: int, *, sign: str = "") -> str:
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in estimate)
    return f"{mean} [{low}, {high}]"
