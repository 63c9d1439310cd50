"""The old name of `sepo plan CONFIG` and `sepo plan --papers`."""

import sys

from sepo.commands import main as cli
from sepo.errors import exit_with_one_line


def main(argv: list[str]) -> None:
    """Print hours of a recipe, or of SePO's Table 1. Raises InputError as `sepo plan` does."""
    now = ["plan", *(argv or ["--papers"])]
    print(f"bench: this is now: sepo {' '.join(now)}", file=sys.stderr)
    cli.run(now)


if __name__ == "__main__":
    exit_with_one_line(lambda: main(sys.argv[1:]))
