"""What the frontier experiment trains: methods at three strengths, sweeps of SePO, granularities."""

from dataclasses import asdict, dataclass, field

# What every run has in common, whatever its method. Not clipped: gradients have norms of 5 to 800
# here, and cutting all of them to 1 undoes what a strength does once a loss saturates.
TRAIN = dict(
    learning_rate=3e-5, num_train_epochs=1, pairs_per_step=8, max_grad_norm=0.0, logging_steps=1
)
ORACLE = dict(method="dpo", beta=0.1, learning_rate=5e-6, num_train_epochs=1, pairs_per_step=4)
# the paper's 0.001 for the L1 norm is as large as the reward's pull at beta 1 after 24 steps, and a
# mask moved faster than this is zero everywhere, for good, before the policy has moved at all
MASK = dict(mask_learning_rate=2e-4, mask_l1=1e-4)
FRACTION, ORACLE_SHARE = 0.3, 100

BETAS = (0.1, 1.0, 10.0)
# label: (arguments of the method, the flag that is its strength, its values; the first is run
# first, and is the papers' default where 24 steps are enough for it to act)
METHODS = {
    "dpo": (dict(method="dpo"), "beta", BETAS),
    "ipo": (dict(method="ipo"), "beta", (5.0, 1.0, 25.0)),  # aims at 1 / (2 beta) nats a token
    "rrhf": (dict(method="rrhf"), "sft_weight", (0.1, 0.01, 1.0)),
    "simpo": (dict(method="simpo"), "beta", (10.0, 2.0, 50.0)),
    "dpop": (dict(method="dpop"), "beta", (0.1, 0.01, 1.0)),  # its penalty is 50 times as steep
    "tdpo1": (dict(method="tdpo1"), "beta", BETAS),
    "tdpo2": (dict(method="tdpo2"), "beta", BETAS),
    "mapo": (dict(method="mapo"), "beta", BETAS),
    "sparsepo": (dict(method="sparsepo", **MASK), "beta", BETAS),
    "sparsepo-independent": (
        dict(method="sparsepo", independent_masks=True, **MASK),
        "beta",
        BETAS,
    ),
    "sepo": (dict(method="sepo", margin=0.5, fraction=FRACTION), "gamma", (2.0, 10.0, 50.0)),
    "sepo-rand": (
        dict(method="sepo-rand", margin=0.5, fraction=FRACTION),
        "gamma",
        (2.0, 10.0, 50.0),
    ),
}
# of the study of granularity alone: rules without an oracle, and SparsePO's ablation; the L1 norm of
# a random mask is a constant
MARGIN = 0.25  # in units of beta: at beta 2 SimPO's loss is SePO's, gamma 2 and lambda 0.5
RULES = {
    "confpo": (dict(method="confpo", gamma_beta_ratio=MARGIN), "beta", (2.0,)),
    "selective-dpo": (dict(method="selective-dpo"), "beta", (0.1,)),
    "sepo-entropy": (
        dict(method="sepo-entropy", margin=0.5, fraction=FRACTION),
        "gamma",
        (2.0,),
    ),
    "sparsepo-random": (dict(method="sparsepo", mask_kind="random", mask_l1=0.0), "beta", (0.1,)),
}
# loss -> which tokens it reads -> label, strength, what else is not the label's own; the first of a
# loss reads all tokens
GRANULARITIES = {
    "SePO": {
        "all": ("simpo", 2.0, dict(gamma_beta_ratio=MARGIN)),
        "30 % at random": ("sepo-rand", 2.0, {}),
        "30 % by the oracle": ("sepo", 2.0, {}),
        "30 % of the highest entropy": ("sepo-entropy", 2.0, {}),
        "below the mean probability": ("confpo", 2.0, {}),
    },
    "DPO": {
        "all": ("dpo", 0.1, {}),
        "40 % that lag behind": ("selective-dpo", 0.1, {}),
    },
    "TDPO1": {
        "all": ("tdpo1", 0.1, {}),
        "weighed at random": ("sparsepo-random", 0.1, {}),
        "weighed by a learned mask": ("sparsepo", 0.1, {}),
        "weighed by activations": ("mapo", 0.1, {}),
    },
}
GRANULARITY_SEEDS = (0, 1, 2)
FRACTIONS = (0.1, 0.2, 0.5, 0.7, 1.0)  # and FRACTION, which the grid has
ORACLE_SHARES = (10, 25, 50)  # per cent of the pairs, and ORACLE_SHARE
MASK_EPOCHS = 4  # of one more SparsePO run: do its masks learn what one epoch was too short for?
# gamma moves SePO little: another learning rate brings it, and others, to each other's divergence
RATES = {"sepo": (3e-6, 1e-5), "dpo": (1e-4,), "tdpo2": (1e-4,), "mapo": (1e-4,)}
SEEDS = (1,)  # of these methods at their first strength, beside seed 0
REPEATED = ("dpo", "tdpo2", "sparsepo", "sepo")


@dataclass(frozen=True)
class Scale:
    """How much of everything; part of what a run is."""

    pairs: int = 192  # the first of the shuffled training pairs
    shuffle_seed: int = 0
    openings: int = 96
    per_opening: int = 2  # samples that the reward is a mean of
    kl_per_opening: int = 1  # samples that the divergence is a mean of, the first ones
    sample_seed: int = 0
    heldout: int = 71  # pairs on which learned masks are looked at


QUICK = Scale(pairs=24, openings=4, heldout=4)  # 3 steps, the first of them warm-up


@dataclass(frozen=True)
class Run:
    """One policy: trained, evaluated, and kept in the folder of its name."""

    part: str  # what for: frontier, k, oracle, seed, rate, mask, granularity; reference, untrained
    label: str  # the method, as tables and figures call it
    strength: tuple[str, float] | None = None
    arguments: dict = field(default_factory=dict)  # of the training, seed and all
    oracle_share: int | None = None  # per cent of the pairs its oracle saw, None: it has none

    @property
    def name(self) -> str:
        if self.strength is None:
            return self.label
        flag, value = self.strength
        parts = [self.label, f"{flag}{value:g}"]
        if self.epochs != TRAIN["num_train_epochs"]:
            parts.append(f"epochs{self.epochs}")
        if (rate := self.arguments["learning_rate"]) != TRAIN["learning_rate"]:
            parts.append(f"rate{rate:g}")
        if "gamma_beta_ratio" in self.arguments:
            parts.append(f"ratio{self.arguments['gamma_beta_ratio']:g}")
        if "fraction" in self.arguments:
            parts.append(f"k{self.arguments['fraction']:g}")
        if self.oracle_share is not None:
            parts.append(f"oracle{self.oracle_share}")
        return "_".join([*parts, f"seed{self.arguments['seed']}"])

    @property
    def epochs(self) -> int:
        return self.arguments["num_train_epochs"]

    def settings(self, scale: Scale) -> dict:
        """All that decides the result; a result of other settings is not this run's."""
        oracle = {} if self.oracle_share is None else {"oracle": ORACLE | {"seed": 0}}
        return asdict(self) | asdict(scale) | oracle


REFERENCE = Run("reference", "reference")


def grid() -> list[Run]:
    """All runs, in the order in which they are worth having: each method once, then the rest."""
    first = {label: values[0] for label, (_, _, values) in METHODS.items()}
    every = lambda place: [
        make_run("frontier", label, values[place]) for label, (_, _, values) in METHODS.items()
    ]
    sepo = lambda part, **changes: make_run(part, "sepo", first["sepo"], **changes)
    runs = [
        REFERENCE,
        *every(0),
        *(sepo("k", fraction=fraction) for fraction in FRACTIONS),
        *(sepo("oracle", share=share) for share in ORACLE_SHARES),
        *every(1),
        *every(2),
        make_run("mask", "sparsepo", BETAS[-1], num_train_epochs=MASK_EPOCHS),
        *(make_run("seed", label, first[label], seed=s) for s in SEEDS for label in REPEATED),
        *(
            make_run("rate", label, first[label], learning_rate=rate)
            for label, rates in RATES.items()
            for rate in rates
        ),
    ]
    known = {run.name for run in runs}
    return runs + [run for run in all_granularities() if run.name not in known]


def granularities() -> dict[tuple[str, str], list[Run]]:
    """Loss and tokens -> one run a seed; those that the rest of the grid has are the grid's."""
    by_name = {run.name: run for run in grid()}
    return {
        (loss, tokens): [
            by_name[make_run("granularity", label, value, seed=seed, **changes).name]
            for seed in GRANULARITY_SEEDS
        ]
        for loss, kinds in GRANULARITIES.items()
        for tokens, (label, value, changes) in kinds.items()
    }


def all_granularities() -> list[Run]:
    """A seed after the other, so that a part of the study compares all of them."""
    return [
        make_run("granularity", label, value, seed=seed, **changes)
        for seed in GRANULARITY_SEEDS
        for kinds in GRANULARITIES.values()
        for label, value, changes in kinds.values()
    ]


def make_run(
    part: str, label: str, value: float, *, seed: int = 0, share: int = ORACLE_SHARE, **changes
) -> Run:
    arguments, flag, _ = (METHODS | RULES)[label]
    arguments = TRAIN | arguments | {flag: value, "seed": seed} | changes
    return Run(part, label, (flag, value), arguments, share if label == "sepo" else None)
