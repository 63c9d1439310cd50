"""The rows of a run as bars: a panel a case, medians with their quartiles, ours in one colour."""

from pathlib import Path

OURS, PEERS, BASE = "#1f77b4", "#8c8c8c", "#d98c3f"  # readable on white and on dark pages
SPREAD = 20  # times the shortest: beyond it the longest would leave nothing to see of the others


def draw(records: list[dict], path: Path, *, title: str = "") -> None:
    """Write an SVG (or what the path's suffix says) of all rows that have a time; none, no file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    cases: dict[str, list[dict]] = {}
    for record in records:
        if record["median"]:
            cases.setdefault(record["case"], []).append(record)
    if not cases:
        return
    heights = [len(rows) + 1.5 for rows in cases.values()]
    figure = Figure(figsize=(8, 0.8 + 0.28 * sum(heights)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (case, rows) in zip(axes, cases.items(), strict=True):
        _panel(panel, case, rows)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    # text stays text, to be found and copied; the same rows give the same file
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sepo"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(panel, case: str, rows: list[dict]) -> None:
    # whole steps are told in seconds a pair
    scale, unit = (1, "s a pair") if rows[0]["suite"] == "step" else (1e3, "ms")
    medians = [scale * row["median"] for row in rows]
    off = lambda row, side: scale * abs(row["median"] - row["quartiles"][side])
    spread = [[off(row, side) for row in rows] for side in (0, 1)]
    is_base = [row.get("side") == "base" for row in rows]
    colours = [BASE if b else OURS if row["ours"] else PEERS for row, b in zip(rows, is_base)]  # noqa: B905
    places, black = range(len(rows)), dict(ecolor="black", error_kw={"lw": 0.8})
    bars = panel.barh(places, medians, xerr=spread, color=colours, **black)
    numbers = [f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in medians]
    panel.bar_label(bars, numbers, padding=4, fontsize=7)
    panel.margins(x=0.1)  # room for the label of the longest
    labels = [row["provider"] + " (base)" * b for row, b in zip(rows, is_base)]  # noqa: B905
    panel.set_yticks(places, labels, fontsize=8)
    panel.invert_yaxis()  # as in the table
    if max(medians) > SPREAD * min(medians):
        panel.set_xscale("log")
        unit += ", logarithmic"
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(f"{case}, {unit}", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
