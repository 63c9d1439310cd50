"""Charts as inline SVG: built as a tree, so text from the data is escaped wherever it stands."""

import math
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup

from sepo.report.charts import Chart, Series

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 10, 46
FEW = 30  # points that get a dot each: one alone would be no line
COLOURS, DASHES = 6, 4  # of the style sheet
LEAST = 1e-290  # a height that has round numbers in it


def draw(chart: Chart) -> Markup:
    """One chart with axes; its colours are the page's, its title and text are for screen readers."""
    ids = f"{chart.key}-title", f"{chart.key}-text"
    box = f"0 0 {WIDTH} {HEIGHT}"
    svg = Element("svg", {"viewBox": box, "role": "img", "aria-labelledby": " ".join(ids)})
    SubElement(svg, "title", id=ids[0]).text = f"{chart.title}: {chart.source}"
    SubElement(svg, "desc", id=ids[1]).text = chart.text
    x_range, y_range = ranges(chart)
    to_x = _scale(x_range, LEFT, WIDTH - RIGHT)
    to_y = _scale(y_range, HEIGHT - BOTTOM, TOP)
    for value in ticks(*x_range):
        x = to_x(value)
        _line(svg, "grid", x, TOP, x, HEIGHT - BOTTOM)
        _text(svg, x, HEIGHT - BOTTOM + 16, tick_text(value), "middle")
    for value in ticks(*y_range):
        y = to_y(value)
        _line(svg, "grid", LEFT, y, WIDTH - RIGHT, y)
        _text(svg, LEFT - 6, y + 4, tick_text(value), "end")
    _line(svg, "axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x_label, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = _text(svg, 13, middle, chart.y_label, "middle")
    label.set("transform", f"rotate(-90 13 {middle:g})")
    for series in chart.series:
        points = _points(series, chart.has_steps)
        path = _path(points, to_x, to_y)
        SubElement(svg, "path", {"class": f"line {style(series)}", "d": path})
        if len(points) <= FEW and not chart.has_steps:
            for x, y in points:
                if y is not None:
                    at = {"cx": f"{to_x(x):.1f}", "cy": f"{to_y(y):.1f}", "r": "2.5"}
                    SubElement(svg, "circle", {"class": f"dot {style(series)}", **at})
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def key(series: Series) -> Markup:
    """A stroke for the legend."""
    svg = Element("svg", {"class": "key", "viewBox": "0 0 28 8", "aria-hidden": "true"})
    SubElement(svg, "path", {"class": f"line {style(series)}", "d": "M0 4H28"})
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def style(series: Series) -> str:
    return f"s{series.colour % COLOURS} d{series.dash % DASHES}"


def ranges(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """Find what the axes show: the chart's own choice, or the data with a little room."""
    x_range, y_range = chart.x_range, chart.y_range
    if x_range is None:
        x_range = _extent([x for s in chart.series for x in s.x], 0)
    if y_range is None:
        y_range = _extent([y for s in chart.series for y in s.y if y is not None], 0.05)
    return x_range, y_range


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    return (
        f"{value:.10g}".replace("-", "−")
        if 1e-3 <= abs(value) < 1e6 or not value
        else f"{value:.2g}"
    )


def _extent(values: Sequence[float], room: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < LEAST:
        margin = 0.5 * abs(low) if abs(low) > LEAST else 0.5
        return low - margin, high + margin
    return low - room * (high - low), high + room * (high - low)


def _scale(source: tuple[float, float], start: float, end: float):
    per_unit = (end - start) / (source[1] - source[0])
    return lambda value: start + (value - source[0]) * per_unit


def _points(series: Series, has_steps: bool) -> list[tuple[float, float | None]]:
    if not has_steps:
        return list(zip(series.x, series.y, strict=True))
    corners = zip(series.x, series.x[1:], series.y, strict=False)
    return [(x, y) for left, right, y in corners for x in (left, right)]


def _path(points: Sequence[tuple], to_x, to_y) -> str:
    parts, pen_is_up = [], True
    for x, y in points:
        if y is None:
            pen_is_up = True
            continue
        parts.append(f"{'M' if pen_is_up else 'L'}{to_x(x):.1f} {to_y(y):.1f}")
        pen_is_up = False
    return "".join(parts)


def _line(svg: Element, name: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {"class": name, **{k: f"{v:.1f}" for k, v in ends.items()}})


def _text(svg: Element, x: float, y: float, text: str, anchor: str) -> Element:
    element = SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor})
    element.text = text
    return element
