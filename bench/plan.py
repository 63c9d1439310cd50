"""The old name of `sepo plan --dataset_name DATA`, with the demo's pairs and model as defaults."""

import sys
from pathlib import Path

from sepo.commands import main as cli
from sepo.demo.smollm2 import save_smollm2
from sepo.errors import exit_with_one_line

ROOT = Path(__file__).parents[1]


def main(argv: list[str]) -> None:
    """Print how full micro-batches are. Raises InputError as `sepo plan` does."""
    now = ["plan", *(word.replace("--dataset", "--dataset_name", 1) if word.startswith("--dataset")
                     else word for word in argv)]  # fmt: skip
    if not any(word.startswith("--dataset") for word in argv):
        now += ["--dataset_name", str(ROOT / "python/sepo/demo/data/pairs.jsonl")]
    now += ["--model_name_or_path", str(save_smollm2(ROOT / "runs/smollm2"))]
    print(f"bench: this is now: sepo {' '.join(now)}", file=sys.stderr)
    cli.run(now)


if __name__ == "__main__":
    exit_with_one_line(lambda: main(sys.argv[1:]))
