"""`pytest bench`: options, the choice of cases, and the tables at the end."""

from pathlib import Path

import pytest
import torch

from bench import report
from bench.harness import ROUNDS, device_here, run_case, takes_part
from bench.suite import EXTENTS, entries

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("sepo benchmarks")
    group.addoption("--extent", default="usual", choices=EXTENTS, help="quick: one case each")
    group.addoption("--rounds", type=int, default=ROUNDS, help="of each case")
    group.addoption("--device", default=device_here(), choices=["cpu", "cuda"])
    group.addoption("--json", type=Path, help="append rows to this file; default bench/results")


def pytest_configure(config):
    # warnings are errors in tests; here they are the peers', and none of our business
    config.addinivalue_line("filterwarnings", "ignore")
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    pairs = [
        pytest.param(case, provider, id=f"{case.name}-{provider.name}")
        for case, contenders in entries(option("device"), option("extent"))
        for provider in contenders
        if takes_part(provider, case)
    ]
    metafunc.parametrize(("case", "provider"), pairs)


@pytest.fixture(scope="session")
def measured(request):
    """Rows of a case by provider's name: measured together, when the first of them is asked for."""
    config, done = request.config, {}

    def rows_of(case) -> dict:
        if case.name not in done:
            chosen = [
                item.callspec.params["provider"]
                for item in request.session.items
                if item.callspec.params["case"] == case
            ]
            device, rounds = config.getoption("device"), config.getoption("rounds")
            rows = run_case(case, chosen, device=device, rounds=rounds)
            config.stash[ROWS].append(rows)
            path = config.getoption("json") or report.default_path(device)
            report.append(rows, path, device)
            done[case.name] = {row.provider: row for row in rows}
        return done[case.name]

    return rows_of


def pytest_terminal_summary(terminalreporter, config):
    tables = config.stash[ROWS]
    if not tables:
        return
    write = terminalreporter.write_line
    device = config.getoption("device")
    write("")
    write(f"{report.machine(device)}, {torch.get_num_threads()} threads, {report.commit()}")
    write(", ".join(report.versions([row for rows in tables for row in rows])))
    write(report.LEGEND)
    for rows in tables:
        write(report.table(rows))
    write(f"\nappended to {config.getoption('json') or report.default_path(device)}")
