"""Some 1,000 bad inputs: exit code 2, one line on stderr, no traceback, and nothing written."""

import os
import re
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from hostile.bad_files import file_cases
from hostile.bad_inputs import Case, cases
from hostile.odd_inputs import odd_cases
from processes import ENVIRONMENT
from training_run import make_run

from sepo.commands import main as cli
from sepo.errors import exit_with_one_line

ALL = [*cases(), *file_cases(), *odd_cases()]
CASES = [case for case in ALL if not case.process]
PROCESSES = [*(case for case in ALL if case.process), *CASES[::100]]  # and a sample once more
SECONDS = 60
# tracebacks of today, each a gap in the reading of stores, models and data files
# of progress, whose end is known or not: there is more than one way to end its line
BAR = re.compile(r"\r|\d+%\||\[\d+:\d+, .*/s\]$")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    make_run(path)
    row = '{"prompt": "w3 w4", "chosen": "w5 w6", "rejected": "w7"}\n'
    (path / "pairs.jsonl").write_text(row)
    return path


def named(cases: list[Case]) -> list:
    return [pytest.param(case, id=case.id) for case in cases]


@pytest.mark.parametrize("case", named(CASES))
def test_refused_in_one_line(case, home, tmp_path, capfd, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    check(case, home, tmp_path, figures, lambda argv: in_this_process(argv, capfd))


@pytest.mark.parametrize("case", named(PROCESSES))
def test_refused_by_a_process_of_its_own(case, home, tmp_path, figures):
    run = lambda argv: in_a_process(argv, tmp_path, case.environment)
    check(case, home, tmp_path, figures, run)


def check(case: Case, home: Path, tmp_path: Path, figures, run) -> None:
    case.prepare(home, tmp_path)
    before = everything_in(home, tmp_path)
    argv = [word.replace("HOME", str(home)).replace("TMP", str(tmp_path)) for word in case.argv]
    code, error, hung = run(argv)
    lines = [line for line in error.split("\n") if line.strip() and not BAR.search(line)]
    wrong = {
        "tracebacks": "Traceback" in error,
        "hung": hung,
        "other_exit_codes": code != 2,
        "not_one_line": len(lines) != 1 or not lines[0].startswith("sepo: error: "),
        "written": everything_in(home, tmp_path) != before,
    }
    figures("bad inputs", tried=1, **{what: int(is_so) for what, is_so in wrong.items()})
    assert not any(wrong.values()), f"{[w for w in wrong if wrong[w]]}, code {code}:\n{error}"


def in_this_process(argv: list[str], capfd) -> tuple[int | None, str, bool]:
    """Exit code, stderr, and whether it took too long; any other exception as a traceback."""
    capfd.readouterr()
    code, more, hung = None, "", False
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            exit_with_one_line(lambda: cli.run(argv))
    except SystemExit as stop:
        code = stop.code
    except TimeoutError:
        hung = True
    except Exception:
        more = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return code, capfd.readouterr().err + more, hung


def in_a_process(argv: list[str], folder: Path, environment: dict) -> tuple[int | None, str, bool]:
    """The same of `python -m sepo.commands.main`, which may use some memory and no more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sepo.commands.main", *argv],
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=little_memory,
    )
    try:
        error = process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[1], True
    return process.returncode, error, False


def little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))


def too_long(number, frame):
    raise TimeoutError


def everything_in(*places: Path) -> dict:
    """Every file and folder, with what would change if it were written to."""
    found = {}
    for place in places:
        for path in place.rglob("*"):
            about = os.lstat(path)
            found[path] = (about.st_size, about.st_mtime_ns) if path.is_file() else None
    return found
