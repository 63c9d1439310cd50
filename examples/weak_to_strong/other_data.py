"""Weak-to-strong, second kind: an oracle trained on set A selects on set B.

    python examples/weak_to_strong/other_data.py      # every stage once; run again to continue

A and B are preference pairs of different openings (see Stages.halves). The policy is trained on B
alone; its oracle has never seen a pair of B. Stages that small_oracle.py has made are used.
"""

import argparse
import json
from pathlib import Path

from stages import Stages, compare_policies, compare_selections
from transformers import AutoTokenizer

from sepo.smollm2 import save_smollm2


def main() -> None:
    args = parse_args()
    stages = Stages(args.place, save_smollm2(args.model))
    policy, (others, pairs) = stages.model, stages.halves()
    oracles = {
        "full": stages.oracle("full", policy, pairs),
        "other": stages.oracle("other", policy, others),
    }
    by = {name: stages.selection(name, oracle, policy, pairs) for name, oracle in oracles.items()}
    policies = {name: stages.policy(name, stores["b"]) for name, stores in by.items()}
    policies["random"] = stages.policy("random", by["full"]["b"], method="sepo-rand")
    policies["reference"] = policy
    tokenizer = AutoTokenizer.from_pretrained(policy)
    result = {
        "selection": {
            where: compare_selections({k: v[where] for k, v in by.items()}, "full", tokenizer)
            for where in ("b", "heldout")
        },
        "policy": compare_policies(
            {name: stages.evaluation(name, path) for name, path in policies.items()},
            ("full", "random"),
        ),
    }
    out = args.place / "other_data.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out.read_text())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=Path("runs/smollm2"), help="the policy, made if missing")
    add("--place", type=Path, default=Path("runs/weak-to-strong"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
