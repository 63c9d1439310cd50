"""The study's figure, and its tables as Markdown, from the rows that are there.

python -m examples.precision.report runs/precision/study.jsonl examples/precision/precision.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "sepo"  # the same rows give the same bytes
matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines: two thirds of the size
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {
    "float32": "float32",
    "split": "float32 from bfloat16 halves",
    "split bfloat16 weights": "the same of bfloat16 checkpoints, beside float64 of those",
    "tf32": "TF32",
    "float16": "float16",
    "bfloat16 weights": "bfloat16 weights, float32 arithmetic",
    "bfloat16 oracle checkpoint": "bfloat16 checkpoint of the oracle alone",
    "bfloat16": "bfloat16",
    "bfloat16 logits": "bfloat16, logits rounded too",
    "random": "random",
}
MARKERS = dict(zip(LABELS, "ohHs^DPv*x", strict=True))
SELECTIONS = ("float32", "bfloat16", "random", "reference")


def draw(rows: list[dict], path: Path) -> None:
    """Overlaps, and beside them the policies if there are any, with 95 % intervals, as svg."""
    policies = {row["selection"]: row for row in rows if row["part"] == "policies"}
    ratios = (3, 1.2) if policies else (1,)
    figure, panels = plt.subplots(
        1,
        len(ratios),
        figsize=(9.5 if policies else 7, 3.8),
        width_ratios=ratios,
        layout="constrained",
        squeeze=False,
    )
    draw_overlap(panels[0, 0], [row for row in rows if row["part"] == "overlap"])
    if policies:
        draw_policies(panels[0, 1], policies)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_overlap(axes, rows: list[dict]) -> None:
    spread = {r["oracle_steps"]: r["spread"] for r in rows}
    for name, label in LABELS.items():
        line = sorted((r for r in rows if r["variant"] == name), key=lambda r: r["oracle_steps"])
        if not line:  # of a study from before this variant
            continue
        means = [r["kept"] for r in line]
        bars = [
            [r["kept"] - r["kept_ci95"][0] for r in line],
            [r["kept_ci95"][1] - r["kept"] for r in line],
        ]
        axes.errorbar(
            [r["oracle_steps"] for r in line],
            means,
            yerr=bars,
            label=label,
            marker=MARKERS[name],
            markersize=5,
            linewidth=1.2,
            capsize=2,
            color="0.5" if name == "random" else None,
        )
    axes.set_xscale("log")
    ticks = [f"{steps}\n{value:.2g}" for steps, value in spread.items()]
    axes.set_xticks(list(spread), ticks)
    axes.minorticks_off()
    axes.set_xlabel("oracle's DPO steps, and below them the spread of its scores in nats")
    axes.set_ylabel("share of the float64 selection kept")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="lower center")


def draw_policies(axes, rows: dict[str, dict]) -> None:
    rows = {name: rows[name] for name in SELECTIONS if name in rows}
    for place, row in enumerate(rows.values()):
        low, high = row["sentiment_ci95"]
        mean = row["sentiment"]
        axes.errorbar(
            place, mean, yerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0"
        )
    axes.set_xticks(range(len(rows)), list(rows), rotation=30)
    axes.set_xlim(-0.5, max(len(rows), 1) - 0.5)
    axes.set_xlabel("selection of the policy's tokens")
    axes.set_ylabel("mean sentiment of samples")
    axes.grid(alpha=0.3, axis="y")


def overlap_table(rows: list[dict]) -> list[str]:
    """Shares of the float64 selection kept, by oracle steps, with half the 95 % interval."""
    rows = [row for row in rows if row["part"] == "overlap"]
    steps = sorted({row["oracle_steps"] for row in rows})
    found = {(row["variant"], row["oracle_steps"]): row for row in rows}
    spread = [next(r["spread"] for r in rows if r["oracle_steps"] == n) for n in steps]
    lines = [
        cells("oracle's steps", [str(n) for n in steps]),
        cells("---", ["---:"] * len(steps)),
        cells("spread of scores, nats", [f"{value:.3f}" for value in spread]),
    ]
    for name, label in LABELS.items():
        kept = [found.get((name, n)) for n in steps]
        lines.append(cells(label, ["" if r is None else interval(r, "kept") for r in kept]))
    return lines


def fractions_table(rows: list[dict]) -> list[str]:
    """Shares kept at every fraction, and errors in nats, of the rows that have them."""
    rows = [row for row in rows if "kept_at" in row]
    at = sorted({float(f) for row in rows for f in row["kept_at"]})
    shares = [f"kept at {f:.0%}" for f in at]
    lines = [
        cells("oracle's steps", ["arithmetic", *shares, "error of logp", "of a score"]),
        cells("---:", ["---", *["---:"] * (len(at) + 2)]),
    ]
    for row in sorted(rows, key=lambda r: (r["oracle_steps"], [*LABELS].index(r["variant"]))):
        kept = [f"{row['kept_at'][str(f)]:.3f}" for f in at]
        errors = [f"{row[name]:.1e}" for name in ("logp_error_mean", "error_mean")]
        lines.append(cells(str(row["oracle_steps"]), [LABELS[row["variant"]], *kept, *errors]))
    return lines


def policy_table(rows: list[dict]) -> list[str]:
    """Both seeds together: sentiment, its difference from float32's, and KL per token."""
    lines = [
        cells("selection", ["sentiment", "less float32's", "KL per token, nats"]),
        cells("---", ["---:"] * 3),
    ]
    for row in rows:
        if row["part"] == "policies":
            name = row["selection"]
            kl = [
                f"{r['kl_per_token']:.4f}"
                for r in rows
                if r["part"] == "policy" and r["selection"] == name and "kl_per_token" in r
            ]
            difference = "" if name == "float32" else interval(row, "difference")
            lines.append(cells(name, [interval(row, "sentiment"), difference, ", ".join(kl)]))
    return lines


def cells(first: str, others: list[str]) -> str:
    return " | ".join(["", first, *others, ""]).strip()


def interval(row: dict, name: str) -> str:
    return f"{row[name]:.3f} ± {row[f'{name}_ci95'][1] - row[name]:.3f}"


if __name__ == "__main__":
    found = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    draw(found, Path(sys.argv[2]))
    print("\n".join([*overlap_table(found), "", *fractions_table(found), "", *policy_table(found)]))
