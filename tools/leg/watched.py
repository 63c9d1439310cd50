"""Run compute-sanitizer on a program: 0 nothing was found, 1 something was, 75 it would not watch.

python tools/leg/watched.py /path/of/compute-sanitizer [its options] program [arguments]
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a program
    sys.path[:1] = [str(Path(__file__).resolve().parents[2])]

from bench import ledger  # noqa: E402

FOUND = 9  # the exit status that it is told to take when it has found something
SUMMARY = "ERROR SUMMARY"  # its last line, and racecheck's begins otherwise
RACES = "RACECHECK SUMMARY"


def main(argv: Sequence[str]) -> int:
    command = [argv[0], "--error-exitcode", str(FOUND), *argv[1:]]
    said, watched = "", False
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            watched |= SUMMARY in line or RACES in line
            said = line.strip("= \n") or said
    if process.returncode == 0 and watched:
        return 0
    # a device or a driver that it does not know, no permission: nothing was watched
    if process.returncode != FOUND and not watched:
        ledger.at(f"compute-sanitizer refuses: {said or f'exit status {process.returncode}'}")
        return ledger.REFUSED
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
