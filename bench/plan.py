"""The old name of `sepo plan --dataset_name DATA`: python -m bench.plan --dataset DATA"""

import sys

from sepo.commands import main as cli
from sepo.errors import exit_with_one_line

if __name__ == "__main__":
    now = ["plan", *(word.replace("--dataset", "--dataset_name") for word in sys.argv[1:])]
    print(f"bench: this is now: sepo {' '.join(now)}", file=sys.stderr)
    exit_with_one_line(lambda: cli.run(now))
