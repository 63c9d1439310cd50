"""Run pytest on broken copies of the code, one after another, importing once what they all import.

mutants.py JOBS.json: a list of {"folder": the copy, "arguments": pytest's}. JOBS.json gets what came
of each: {"code": pytest's exit code, None if it took too long, "said": what it printed}.
Nothing runs in the parent but this file, and it imports nothing of the copies' own.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

SECONDS = 240  # of one copy
WARM = "torch", "transformers.trainer", "accelerate", "peft", "safetensors.torch", "datasets"


def main(path: Path) -> None:
    for name in WARM:
        with suppress(ImportError):  # not on every machine
            importlib.import_module(name)
    jobs = json.loads(path.read_text())
    for job in jobs:
        job.update(run(Path(job["folder"]), job["arguments"]))
    path.write_text(json.dumps(jobs))


def run(folder: Path, arguments: list[str]) -> dict:
    said = folder / "said.txt"
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)  # which ends the process
        work(folder, arguments, said)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"code": None if code < 0 else code, "said": said.read_text()}


def work(folder: Path, arguments: list[str], said: Path) -> None:
    """Never returns."""
    code = 4
    try:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        paths = [str(folder / name) for name in ("", "python", "tests", "tests/helpers")]
        sys.path[0:1] = paths  # the first was this file's
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        # a plugin of pytest is imported by now; its own assertions need not be rewritten
        late = "-Wignore::pytest.PytestAssertRewriteWarning"
        code = int(pytest.main([late, *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
