"""SePO's selection as -100 labels, for any trainer that takes input_ids and labels.

    python examples/drop_in/minus_100.py runs/scored --fraction 0.3 --output selected.jsonl

A line a pair: {"chosen": {"input_ids", "labels"}, "rejected": {...}}. For SFT use the chosen half.
"""

import argparse
import json

from sepo.data.store import ScoredStore
from sepo.errors import exit_with_one_line
from sepo.patch import labelled_pairs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="written by `sepo score`")
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    pairs = list(labelled_pairs(ScoredStore.open(args.store), args.fraction))
    with open(args.output, "w") as file:
        for pair in pairs:
            file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    exit_with_one_line(main)
