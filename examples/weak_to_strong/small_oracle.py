"""Weak-to-strong, first kind: a small oracle selects for a larger policy.

    python examples/weak_to_strong/small_oracle.py      # every stage once; run again to continue

The small model is the policy cut to its first layers and repaired by SFT on the whole model's own
samples. It becomes an oracle by DPO, with its repaired self as the reference.
"""

import subprocess
import sys
from pathlib import Path

from stages import Stages, parser

from sepo.demo.smollm2 import save_smollm2

HERE = Path(__file__).parent
REPAIR = "--method sft --learning_rate 1e-3 --num_train_epochs 2 --pairs_per_step 16 --seed 0"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--layers", type=int, default=10, help="of the policy's 30, for the oracle"
    )
    args = arguments.parse_args()
    stages = Stages(args.place, save_smollm2(args.model))
    policy, (_, pairs) = stages.model, stages.halves()

    script = lambda name, *options: [str(HERE / name), "--model", str(policy), *options]
    cut = stages.make(
        f"cut-{args.layers}",
        lambda out: python(*script("cut_layers.py", "--layers", str(args.layers), "--out", out)),
    )
    texts = stages.make("texts.jsonl", lambda out: python(*script("sample_texts.py", "--out", out)))
    small = stages.train(f"small-{args.layers}", cut, texts, REPAIR)

    weak = stages.oracle("weak", small, pairs)
    full = stages.oracle("full", policy, pairs)
    by = {
        "full": stages.selection("full", full, policy, pairs),
        "weak": stages.selection("weak", weak, small, pairs),
    }
    policies = {
        "full": stages.policy("full", by["full"]["b"]),
        "weak": stages.policy("weak", by["weak"]["b"]),
        "random": stages.policy("random", by["full"]["b"], method="sepo-rand"),
        "reference": policy,
    }
    heldout = by["full"]["heldout"]
    models = {"whole": policy, cut.name: cut, small.name: small}
    nll = {name: stages.nll(name, model, heldout) for name, model in models.items()}
    stages.report("small_oracle", {"heldout_nll": nll, **stages.comparison(by, policies)})


def python(*command) -> None:
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)


if __name__ == "__main__":
    main()
