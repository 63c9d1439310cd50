"""What a process is at, a line each, in a file that outlives it.

Whoever started the process marks the last line of one that died. The next one leaves that out.
"""

import os
from pathlib import Path

VARIABLE = "SEPO_LEG_LEDGER"
DEAD = "dead: "
# exit statuses: the device can't be used any more, start me again; there is nothing I can do here
BROKEN, REFUSED = 70, 75


def at(what: str) -> None:
    """Say so, where somebody listens."""
    if path := os.environ.get(VARIABLE):
        with open(path, "a") as file:
            file.write(what + "\n")


def lines() -> list[str]:
    path = Path(os.environ.get(VARIABLE, os.devnull))
    return path.read_text().splitlines() if path.exists() else []


def died_in(what: str) -> bool:
    """Whether a process before this one did."""
    return DEAD + what in lines()
