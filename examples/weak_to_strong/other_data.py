"""Weak-to-strong, second kind: an oracle trained on set A selects on set B.

    python examples/weak_to_strong/other_data.py      # every stage once; run again to continue

A and B are preference pairs of different openings (see Stages.halves). The policy is trained on B
alone; its oracle has never seen a pair of B. Stages that small_oracle.py has made are used.
"""

from stages import Stages, parser

from sepo.demo.smollm2 import save_smollm2


def main() -> None:
    args = parser(__doc__).parse_args()
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
    stages.report("other_data", stages.comparison(by, policies))


if __name__ == "__main__":
    main()
