"""The frontier experiment's table and figures, from the results that are whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from frontier_granularity import draw_granularity, granularity_table, kinds_of  # noqa: E402
from frontier_grid import METHODS, REFERENCE, Run, Scale, granularities, grid  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

STYLE = {
    "svg.fonttype": "none",  # text stays text: a tenth of the size
    "svg.hashsalt": "sepo",  # the same figure gives the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MARKERS = "osD^v<>PX*hd"
LAST_QUARTER = 0.75  # of a training: what its end is a mean over


def write_report(place: Path, results: dict[str, dict], runs: list[Run], to: Path) -> None:
    """frontier.md and its figures in `to`, of whatever is whole; what is not is named."""
    to.mkdir(parents=True, exist_ok=True)
    whole = [run for run in runs if run.name in results]
    with plt.rc_context(STYLE):
        draw_frontier(results, whole, to / "frontier.svg")
        draw_sweeps(results, whole, to / "sweeps.svg")
        draw_masks(place, whole, to / "masks.svg")
    parts = [
        frontier_table(results, whole),
        sweep_table(results, whole),
        seed_table(results, [run for run in whole if run.part != "granularity"]),
        mask_table(place, results, whole),
    ]
    if missing := [run.name for run in runs if run.name not in results]:
        parts.append(f"**Not whole, {len(missing)} of {len(runs)}:** {', '.join(missing)}.")
    file = to / "frontier.md"
    file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    print(f"{len(whole)} of {len(runs)} runs: {file}")


def write_granularity(results: dict[str, dict], to: Path, scale: Scale) -> None:
    """granularity.md and its figure in `to`, if a run of the study is whole."""
    if not (kinds := kinds_of(granularities(), results, scale)):
        return
    to.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        draw_granularity(kinds, to / "granularity.svg")
    (to / "granularity.md").write_text(granularity_table(kinds) + "\n", encoding="utf-8")
    whole, of = (sum(map(len, x)) for x in ([k.seeds for k in kinds], granularities().values()))
    print(f"{whole} of {of} runs: {to / 'granularity.md'}")


def frontier_table(results: dict, runs: list[Run]) -> str:
    best = {run.name for run in frontier(results, policies(runs))}
    lines = [
        "| method | strength | sentiment | KL, nats a response | nats a token | not dominated |",
        "|---|---|---|---|---|---|",
    ]
    for run in by_method(runs, results):
        result = results[run.name]
        strength = f"{run.strength[0]} {run.strength[1]:g}" if run.strength else ""
        rate = f", rate {run.arguments['learning_rate']:g}" if run.part == "rate" else ""
        lines.append(
            f"| {run.label} | {strength}{rate} | {interval(result['reward'])} | "
            f"{interval(result['kl'], 2)} | {result['kl_per_token']['mean']:.4f} | "
            f"{'yes' if run.name in best else ''} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def sweep_table(results: dict, runs: list[Run]) -> str:
    lines = [
        "| SePO | share of tokens | oracle's share of pairs | sentiment | KL, nats a response |",
        "|---|---|---|---|---|",
    ]
    for name, points in sweeps(runs).items():
        for run in points:
            result = results[run.name]
            lines.append(
                f"| {name} | {run.arguments['fraction']:.0%} | {run.oracle_share} % | "
                f"{interval(result['reward'])} | {interval(result['kl'], 2)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def seed_table(results: dict, runs: list[Run]) -> str:
    lines = [
        "| method | strength | seeds | sentiment of each | KL of each, nats a response |",
        "|---|---|---|---|---|",
    ]
    groups = {}
    for run in runs:
        if run.strength:
            but_seed = {k: v for k, v in run.arguments.items() if k != "seed"}
            key = (run.label, run.strength, str(but_seed), run.oracle_share)
            groups.setdefault(key, []).append(run)
    for (label, (flag, value), *_), group in groups.items():
        if len(group) > 1:
            each = lambda key, digits, group=group: ", ".join(
                f"{results[run.name][key]['mean']:.{digits}f}" for run in group
            )
            seeds = ", ".join(str(run.arguments["seed"]) for run in group)
            lines.append(
                f"| {label} | {flag} {value:g} | {seeds} | {each('reward', 3)} | {each('kl', 2)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def mask_table(place: Path, results: dict, runs: list[Run]) -> str:
    lines = [
        "| learned mask | beta | epochs | seed | sparsity, held out | mean on lexicon words / "
        "on other tokens, held out | sparsity, end of training "
        "| KL(ref ‖ policy) then, nats a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for name, mask in results[run.name].get("mask", {}).items():
            ratio, (low, high) = mask["ratio"], mask["ratio_ci95"]
            shown = "–" if None in (ratio, low, high) else f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
            end = at_the_end(place / run.name)
            lines.append(
                f"| {run.label}, {name} | {run.strength[1]:g} | {run.epochs} | "
                f"{run.arguments['seed']} | {mask['sparsity']:.1%} | {shown} | "
                f"{end[SPARSITY[name]]:.1%} | {end['kl']:.4f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def draw_frontier(results: dict, runs: list[Run], file: Path) -> None:
    """Reward over divergence: a line a method through its strengths, other rates beside it."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    for number, label in enumerate(METHODS):
        own = [run for run in policies(runs) if run.label == label]
        points = sorted(
            (results[run.name] for run in own if run.part == "frontier"),
            key=lambda result: result["kl"]["mean"],
        )
        plot(axes, [p["kl"]["mean"] for p in points], points, "reward", number, label)
        for result in (results[run.name] for run in own if run.part == "rate"):  # beside the line
            plot(axes, [result["kl"]["mean"]], [result], "reward", number, None)
    # a logarithm has no place for the reference itself: it is the dotted line
    best = [results[run.name] for run in frontier(results, policies(runs)) if run is not REFERENCE]
    if best:
        steps = [best[0]] + best
        axes.step(
            [p["kl"]["mean"] for p in steps],
            [p["reward"]["mean"] for p in steps],
            where="post", color="0.6", linewidth=4, alpha=0.5, zorder=0, label="Pareto frontier",
        )  # fmt: skip
    if REFERENCE.name in results:
        mean = results[REFERENCE.name]["reward"]["mean"]
        axes.axhline(mean, color="0.5", linestyle=":", linewidth=1, label="reference")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("KL(policy ‖ reference), nats a response, mean, logarithmic")
    axes.set_ylabel("sentiment of the response, mean (−1 to 1)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    save(figure, file)


def draw_sweeps(results: dict, runs: list[Run], file: Path) -> None:
    """SePO against the share of tokens it selects, and against what its oracle saw."""
    figure, axes = plt.subplots(2, 2, figsize=(7, 4.6), sharex="col", sharey="row")
    names = {"k": "tokens selected, %", "oracle": "pairs the oracle was trained on, %"}
    for column, (name, points) in enumerate(sweeps(runs).items()):
        at = [
            100 * run.arguments["fraction"] if name == "k" else run.oracle_share for run in points
        ]
        for row, (key, words) in enumerate(
            (("reward", "sentiment"), ("kl", "KL, nats a response"))
        ):
            plot(axes[row, column], at, [results[run.name] for run in points], key, 0, None)
            axes[row, 0].set_ylabel(words)
        axes[1, column].set_xlabel(names[name])
    save(figure, file)


SPARSITY = {name: f"mask/{name}/sparsity" for name in ("reward", "kl")}


def draw_masks(place: Path, runs: list[Run], file: Path) -> None:
    """SparsePO: sparsity and token-level KL at the end of training, against beta."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.9))
    number = 0
    for label in METHODS:
        points = sorted(
            (r for r in runs if r.part == "frontier" and r.label == label and "sparsepo" in label),
            key=lambda run: run.strength[1],
        )
        at, ends = [run.strength[1] for run in points], [at_the_end(place / r.name) for r in points]
        for panel, keys in zip(axes, (SPARSITY.values(), ["kl"]), strict=True):
            for key in keys:
                if label == "sparsepo" and key == SPARSITY["kl"]:  # a common mask is one mask
                    continue
                if ends and all(key in end for end in ends):
                    panel.plot(
                        at, [end[key] for end in ends], MARKERS[number] + "-",
                        markersize=4, linewidth=1, label=f"{label}: {key}",
                    )  # fmt: skip
                    number += 1
    for panel, words in zip(
        axes, ("share of tokens masked", "KL(ref ‖ policy), nats a token"), strict=True
    ):
        panel.set_xscale("log")
        panel.set_xlabel("beta")
        panel.set_ylabel(words)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize=7)
    save(figure, file)


def plot(axes, at: Sequence[float], points: Sequence[dict], key: str, number: int, label) -> None:
    if not points:
        return
    means = [p[key]["mean"] for p in points]
    half = [p[key]["high"] - p[key]["mean"] for p in points]
    axes.errorbar(
        at, means, yerr=half, fmt=MARKERS[number % len(MARKERS)] + "-", color=f"C{number % 10}",
        markerfacecolor="white" if number >= 10 else None,
        markersize=4, linewidth=1, elinewidth=0.6, label=label,
    )  # fmt: skip


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def policies(runs: list[Run]) -> list[Run]:
    """The runs of the frontier itself: the reference, each method at its strengths and rates."""
    return [run for run in runs if run.part in ("reference", "frontier", "rate")]


def sweeps(runs: list[Run]) -> dict[str, list[Run]]:
    """SePO's runs along each of its two axes, the point that both share included."""
    middle = next(run for run in grid() if run.label == "sepo")
    along = lambda part, key: sorted(
        (run for run in runs if run.part == part or run.name == middle.name), key=key
    )
    return {
        "k": along("k", lambda run: run.arguments["fraction"]),
        "oracle": along("oracle", lambda run: run.oracle_share),
    }


def frontier(results: dict, runs: list[Run]) -> list[Run]:
    """The runs that no other beats: more sentiment for no more divergence. By divergence."""
    best, highest = [], float("-inf")
    order = lambda run: (results[run.name]["kl"]["mean"], -results[run.name]["reward"]["mean"])
    for run in sorted(runs, key=order):
        if (reward := results[run.name]["reward"]["mean"]) > highest:
            best.append(run)
            highest = reward
    return best


def by_method(runs: list[Run], results: dict) -> list[Run]:
    order = [REFERENCE.label, *METHODS]
    place = lambda run: (order.index(run.label), results[run.name]["kl"]["mean"])
    return sorted(policies(runs), key=place)


def at_the_end(folder: Path) -> dict[str, float]:
    """Means over the last quarter of a training's steps, from its own metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    last = [line for line in lines if line["step"] > LAST_QUARTER * lines[-1]["step"]]
    return {key: fmean(line[key] for line in last) for key in last[0]}


def interval(estimate: dict, digits: int = 3) -> str:
    mean, low, high = (f"{estimate[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
