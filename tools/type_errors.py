"""Hold the number of type errors that mypy finds in python/sepo: it may fall, and never grow.

    python tools/type_errors.py

`make lint` checks the packages that have none by name.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 72  # errors of `mypy -p sepo`; lower it when there are fewer


def count(report: str) -> int:
    """Return the errors that mypy's last line counts; ValueError for a report without one."""
    last = report.strip().splitlines()[-1] if report.strip() else ""
    if last.startswith("Success:"):
        return 0
    match = re.match(r"Found (\d+) errors? in ", last)
    if match is None:
        raise ValueError(f"expected mypy's report, got: {last}")
    return int(match[1])


def main() -> int:
    command = [sys.executable, "-m", "mypy", "-p", "sepo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        errors = count(done.stdout)
    except ValueError as error:
        print(f"{error}\n{done.stderr}", file=sys.stderr)
        return 2
    if errors > MOST:
        print(done.stdout, file=sys.stderr)
        print(f"expected at most {MOST} type errors in python/sepo, got {errors}", file=sys.stderr)
        return 1
    if errors < MOST:
        print(f"{errors} type errors in python/sepo: lower the number in {Path(__file__).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
