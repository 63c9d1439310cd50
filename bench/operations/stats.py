"""selected_stats: the statistics of the selected rows beside their log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import plain
from bench.contender import gradients
from bench.operations.head import HeadCase, LogprobInputs

NAMES = ("logp", "entropy", "log_sum_sq", "mean_logit", "lse")


@dataclass(frozen=True)
class StatsCase(HeadCase):
    entropy_grad: bool = False  # the entropy is differentiated too

    def inputs(self, device: str) -> "StatsInputs":
        return StatsInputs(self, device)


class StatsInputs(LogprobInputs):
    """Rows as of the log-probability; objectives "logp" and "trl" ask for less."""

    def __init__(self, case: StatsCase, device: str):
        super().__init__(case, device)
        self.upstream_entropy = self.normal(case.M)

    def names(self, objective: str) -> tuple[str, ...]:
        return {"logp": ("logp",), "trl": NAMES[:-1]}.get(objective, NAMES)

    def values(self, objective: str, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found = dict(zip(NAMES, plain.statistics(z, self.targets), strict=True))
        if objective == "logp":
            return {"logp": found["logp"]}, found["logp"] @ self.upstream.double()
        return found, self.loss(found["logp"], found["entropy"])

    def loss(self, logp: Tensor, entropy: Tensor) -> Tensor:
        """Return what is differentiated of the weighted statistics, of the rows at the start."""
        of_logp, of_entropy = (
            up[: len(logp)].to(logp.dtype) for up in (self.upstream, self.upstream_entropy)
        )
        loss = logp @ of_logp
        return loss + entropy @ of_entropy if self.case.entropy_grad else loss

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        found = super().limits(ours, objective)
        return dict.fromkeys(NAMES, found["logp"]) | found

    def plain(self, gather_first: bool, product=torch.matmul) -> dict[str, Tensor]:
        hidden, weight = self.leaves()
        rows = self.rows.long()
        logits = product(hidden[rows] if gather_first else hidden, weight.T)
        found = plain.statistics(logits if gather_first else logits[rows], self.targets)
        loss = self.loss(found[0], found[1])
        values = {name: x.detach() for name, x in zip(NAMES, found, strict=True)}
        return values | gradients(loss, None, hidden, weight)


def cases(device: str) -> list[StatsCase]:
    few = dict(only=("gemm", "sepo", "dense_gathered", "trl"))
    dtypes = [("bf16", torch.bfloat16, False), ("fp32", torch.float32, True)]
    found = [
        StatsCase(f"stats-{kind}{name}-30", 0.3, dtype, entropy_grad=grad, long=long, **few)
        for name, dtype, long in (dtypes[:1] if device == "cuda" else dtypes)
        for kind, grad in (("", False), ("entropy-", True))
    ]
    if device == "cuda":
        large = dict(dtype=torch.bfloat16, N=8192, response=8192, D=4096, V=128256)
        found += [
            StatsCase(f"stats-{kind}large-30", 0.3, entropy_grad=grad, **large)
            for kind, grad in (("", False), ("entropy-", True))
        ]
    return found
