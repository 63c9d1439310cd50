"""Which figures a report has: collected data in, charts out; how they are drawn is not said here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from sepo.report.ranks import GRID
from sepo.report.scored import SIDES

PERCENT = 100
TABLE_SHARES = (10, 20, 30, 40, 50, 60, 80, 100)
TABLE_ROWS = 12  # a curve's table has no more: it says what the curve looks like
METRICS = (  # title, axis, metrics under one roof; each also as eval_...
    ("Loss", "loss", ("loss",)),
    ("Margin of the rewards", "chosen − rejected", ("rewards/margins",)),
    ("Accuracy", "pairs ranked right", ("rewards/accuracies",)),
    ("Rewards", "reward", ("rewards/chosen", "rewards/rejected")),
    ("Log-probabilities of the responses", "nats", ("logps/chosen", "logps/rejected")),
    ("KL divergence a token", "nats", ("kl",)),
    ("Mask: share of zeros", "share", ("mask/reward/sparsity", "mask/kl/sparsity")),
    ("Mask: mean", "mean", ("mask/reward/mean", "mask/kl/mean")),
    ("Tokens and rows a step", "count", ("tokens/read", "rows/head")),
    ("Throughput", "tokens a second", ("tokens/second",)),
    ("Gradient norm", "norm", ("grad_norm",)),
    ("Learning rate", "rate", ("learning_rate",)),
)


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float | None]  # None: a gap
    colour: int = 0
    dash: int = 0  # so that series differ without colour too


@dataclass(frozen=True, slots=True)
class Chart:
    key: str  # file name, element id
    title: str
    source: str  # the store or runs it is about
    text: str  # what can be read off it, in words
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_range: tuple[float, float] | None = None  # None: of the data
    y_range: tuple[float, float] | None = None
    has_steps: bool = False  # x are the edges of bins, one more than y
    table_at: tuple[float, ...] | None = None  # x of the rows of its table; None: evenly chosen


def short_names(paths: list[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def store_charts(data: dict) -> list[Chart]:
    """Kind by kind, within a kind store by store."""
    charts = []
    names = short_names([store["name"] for store in data["stores"]])
    stores = [{**store, "name": n} for store, n in zip(data["stores"], names, strict=True)]
    for make in (_lengths, _accumulation, _distribution, _places):
        for index, store in enumerate(stores):
            charts += make(store, index, data)
    return charts


def run_charts(runs: list[dict]) -> list[Chart]:
    """One chart a kind of metric, all runs in it; a run's colour, a metric's dashes."""
    charts = []
    short = short_names([run["name"] for run in runs])
    for number, (title, axis, names) in enumerate(METRICS):
        series = []
        wanted = [*names, *(f"eval_{name}" for name in names)]
        for colour, run in enumerate(runs):
            for dash, name in enumerate(wanted):
                if column := run["metrics"].get(name):
                    label = f"{short[colour]}: {name}" if len(runs) > 1 else name
                    look = (colour if len(runs) > 1 else dash, dash)
                    series.append(Series(label, column["step"], column["value"], *look))
        series = [one for one in series if any(value is not None for value in one.y)]
        if not series or all(len(one.x) < 2 for one in series):
            continue
        text = "; ".join(map(_first_to_last, series))
        about = (", ".join(short), text + ".", "step", axis)
        charts.append(Chart(f"run-{number}", title, *about, tuple(series)))
    return charts


def _first_to_last(series: Series) -> str:
    known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    (first_x, first), (last_x, last) = known[0], known[-1]
    ends = f"{_number(first)} at step {first_x:g}, {_number(last)} at step {last_x:g}"
    return f"{series.name} {ends}"


def _lengths(store: dict, index: int, data: dict) -> list[Chart]:
    shares = {side: s for side in SIDES if (s := store["by_share"][side])}
    if not shares:
        return []
    percent = [share * PERCENT for share in GRID]
    series = [
        Series(side, percent, _percent(s["kept"]), SIDES.index(side), SIDES.index(side))
        for side, s in shares.items()
    ]
    first = next(iter(shares.values()))
    series.append(Series("the selected alone", percent, _percent(first["selected"]), 2, 2))
    at = [_share(share) for share in data["shown"]]
    rows = [GRID.index(share) for share in data["shown"]]
    text = "; ".join(
        f"{side}: kept "
        + ", ".join(f"{_share(s['kept'][r])} at k = {k}" for r, k in zip(rows, at, strict=True))
        for side, s in shares.items()
    )
    return [
        Chart(
            f"lengths-{index}",
            "Length after the cut, by share selected",
            store["name"],
            f"Every response ends at its last selected token. {_sentence(text)}",
            "tokens selected, k (%)",
            "tokens kept (%)",
            tuple(series),
            (0, 100),
            (0, 100),
            table_at=TABLE_SHARES,
        )
    ]


def _accumulation(store: dict, index: int, data: dict) -> list[Chart]:
    shares = {side: s for side in SIDES if (s := store["by_share"][side])}
    if not shares:
        return []
    what = {"chosen": "chosen: positive scores", "rejected": "rejected: negative scores"}
    # against what is selected, not against k: of four tokens one is selected at any k up to 49 %
    series = [
        Series(
            what[side],
            [0, *_percent(s["selected"])],
            [0, *_percent(s["held"])],
            SIDES.index(side),
            SIDES.index(side),
        )
        for side, s in shares.items()
    ]
    text = "; ".join(
        f"{side}: {_share(_first_reaching(s, 0.8))} of the tokens hold 80\u00a0% of the "
        + ("positive" if side == "chosen" else "negative")
        + " scores"
        for side, s in shares.items()
    )
    return [
        Chart(
            f"accumulation-{index}",
            "Score held by the top tokens",
            store["name"],
            _sentence(text),
            "most decisive tokens of each response (%)",
            "score held (%)",
            tuple(series),
            (0, 100),
            (0, 100),
            table_at=TABLE_SHARES,
        )
    ]


def _distribution(store: dict, index: int, data: dict) -> list[Chart]:
    histogram = store["histogram"]
    if histogram is None:
        return []
    edges = histogram["edges"]
    series = [
        Series(side, edges, _percent(histogram[side]), SIDES.index(side), SIDES.index(side))
        for side in SIDES
        if store["scores"][side]
    ]
    text = "; ".join(
        f"{side}: mean {signed(s['mean'])} nats, spread {s['spread']:.3g}"
        for side in SIDES
        if (s := store["scores"][side])
    )
    highest = max(max(h[s]) for one in data["stores"] if (h := one["histogram"]) for s in SIDES)
    return [
        Chart(
            f"distribution-{index}",
            "Distribution of the scores",
            store["name"],
            f"{_sentence(text)} {_share(histogram['outside'], 1)} of the tokens lie further out.",
            "score (nats)",
            "tokens (%)",
            tuple(series),
            (edges[0], edges[-1]),
            (0, highest * PERCENT * 1.05),
            has_steps=True,
        )
    ]


def _places(store: dict, index: int, data: dict) -> list[Chart]:
    series, said = [], []
    for side in SIDES:
        shares = store["by_place"][side]
        if all(share is None for share in shares):
            continue
        number, parts = SIDES.index(side), len(shares)
        edges = [i * PERCENT / parts for i in range(parts + 1)]
        values = [None if share is None else share * PERCENT for share in shares]
        series.append(Series(side, edges, values, number, number))
        known = [(value, edge) for value, edge in zip(values, edges, strict=False) if value]
        if known:
            top, start = max(known)
            end = start + PERCENT / parts
            said.append(
                f"{side}: most between {start:g} and {end:g}\u00a0% of a response ({top:.0f}\u00a0%)"
            )
    if not series:
        return []
    how = f"at k = {_share(data['usual'])}" if store["scored"] else "by the data's own weights"
    highest = max(v for one in series for v in one.y if v is not None)
    return [
        Chart(
            f"places-{index}",
            "Where in a response tokens are selected",
            store["name"],
            f"Tokens selected {how}. {_sentence('; '.join(said) or 'none')}",
            "place in the response (%)",
            "selected there (%)",
            tuple(series),
            (0, 100),
            (0, max(1, highest * 1.05)),
            has_steps=True,
        )
    ]


def table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """A chart in numbers: the head, and rows of text."""
    head = [chart.x_label, *(series.name for series in chart.series)]
    if chart.has_steps:
        edges = chart.series[0].x
        names = [minus(f"{a:.3g} to {b:.3g}") for a, b in zip(edges, edges[1:], strict=False)]
        chosen = _spread_out(range(len(names)))
        return head, [[names[i], *(_number(s.y[i]) for s in chart.series)] for i in chosen]
    if chart.table_at is not None:  # of curves without a gap, between whose points lines are drawn
        values = [np.interp(chart.table_at, s.x, np.array(s.y, float)) for s in chart.series]
        rows = zip(chart.table_at, *values, strict=True)
        return head, [[f"{x:g}", *map(_number, ys)] for x, *ys in rows]
    columns = [dict(zip(s.x, s.y, strict=True)) for s in chart.series]
    at = _spread_out(sorted({x for column in columns for x in column}))
    return head, [[f"{x:g}", *(_number(c.get(x)) for c in columns)] for x in at]


def _spread_out(values: Sequence) -> list:
    stride = -(-len(values) // TABLE_ROWS) or 1
    return list(values[::stride])


def _percent(shares: Sequence[float]) -> list[float]:
    return [share * PERCENT for share in shares]


def _first_reaching(shares: dict, part: float) -> float:
    """The share of the tokens that holds this part of the score."""
    pairs = zip(shares["selected"], shares["held"], strict=True)
    # sums of float64 may stop a rounding short of it
    return next((selected for selected, held in pairs if held >= part - 1e-9), 1.0)


def _number(value: float | None) -> str:
    return "–" if value is None else minus(f"{value:.4g}")


def signed(value: float) -> str:
    return minus(f"{value:+.3g}")


def minus(text: str) -> str:
    return text.replace("-", "−")


def _share(share: float, digits: int = 0) -> str:
    return f"{share * PERCENT:.{digits}f}\u00a0%"  # must not be parted at a line's end


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
