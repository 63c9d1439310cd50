"""Input and events that no user means: `make hostile` runs them, `make test` leaves them out.

A test counts what it tried and what went wrong with `figures`; the sums are printed at the end,
whatever process counted.
"""

from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.hostile)


@pytest.fixture
def figures(request):
    """figures("bad inputs", tried=1, tracebacks=0): added up over all tests, under that heading."""

    def add(heading: str, **counts: int) -> None:
        for what, count in counts.items():
            request.node.user_properties.append((f"figures/{heading}", [what, count]))

    return add


def pytest_terminal_summary(terminalreporter):
    sums: dict[str, Counter] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for name, value in report.user_properties:
                if name.startswith("figures/"):
                    what, count = value
                    sums.setdefault(name.removeprefix("figures/"), Counter())[what] += count
    if sums:
        terminalreporter.section("figures")
    for heading, counts in sorted(sums.items()):
        shown = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        terminalreporter.write_line(f"{heading}: {shown}")
