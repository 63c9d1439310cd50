"""The same charts as PNG files, for papers."""

from pathlib import Path
from typing import Any

from sepo.errors import needs
from sepo.report.charts import Chart
from sepo.report.figures import COLOURS, DASHES, ranges
from sepo.system.files import Atomic

# of the style sheet's light half
PALETTE = ("#1f5fa8", "#b3590a", "#5c6570", "#0f766e", "#8a3ab0", "#a61e4d")
STROKES = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 3, 2, 3)))


def write_pngs(charts: list[Chart], folder: Path, *, owner: str) -> list[Path]:
    """One file a chart, 300 dots an inch, named by its key, in a folder that is there."""
    with needs("report", "writing PNG files"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
        from matplotlib.figure import Figure

    files = []
    for chart in charts:
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for series in chart.series:
            look: dict[str, Any] = {
                "color": PALETTE[series.colour % COLOURS],
                "linestyle": STROKES[series.dash % DASHES],
                "label": _plain(series.name),
            }
            y = [float("nan") if value is None else value for value in series.y]
            if chart.has_steps:
                axes.stairs(y, series.x, baseline=None, **look)
            else:
                axes.plot(series.x, y, **look)
        x_range, y_range = ranges(chart)
        axes.set(xlim=x_range, ylim=y_range, xlabel=chart.x_label, ylabel=chart.y_label)
        axes.grid(alpha=0.3)
        axes.set_title(_plain(chart.title), fontsize="medium")
        axes.legend(fontsize="small")
        files.append(folder / f"{chart.key}.png")
        with Atomic(files[-1], owner) as temporary:
            figure.savefig(temporary, dpi=300)
    return files


def _plain(text: str) -> str:
    """matplotlib reads what stands between dollars as a formula, and hides a label after _."""
    return text.replace("$", r"\$").lstrip("_")
