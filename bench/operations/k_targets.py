"""K targets a row, over the vocabulary as distillation asks for them, or over themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import plain
from bench.contender import gradients
from bench.operations.head import HeadCase, LogprobInputs


@dataclass(frozen=True)
class KTargetsCase(HeadCase):
    K: int = 20
    over: str = "vocabulary"  # | "targets"

    @property
    def products(self) -> int:
        """Bare products to be compared with; over the targets the work needs none, and one is shown."""
        return super().products if self.over == "vocabulary" else 1

    def inputs(self, device: str) -> "KTargetsInputs":
        return KTargetsInputs(self, device)


class KTargetsInputs(LogprobInputs):
    """The rows of one target; the first of the K is the one that half of the rows are sure of."""

    def __init__(self, case: KTargetsCase, device: str):
        super().__init__(case, device)
        size = (case.M, case.K)
        more = torch.randint(case.V, size, generator=self.generator, device=device)
        self.targets = torch.cat([self.targets[:, None], more[:, 1:]], 1)  # (M, K)
        self.upstream = self.normal(*size)

    @property
    def flop(self) -> float:
        """Logits and gradients of the targets' rows of the head, beside the head's products."""
        case = self.case
        times = {"both": 3, "hidden": 2, "none": 1}[case.leaves]
        among = 2.0 * case.M * case.K * case.D * times
        return among + (super().flop if case.over == "vocabulary" else 0)

    @property
    def bytes(self) -> float:
        """As of one target; over the targets of the head no more than their rows."""
        case, entry = self.case, self.hidden.element_size()
        among = case.M * case.K * (case.D * entry + 8 + 4)
        return among + super().bytes - (self.weight.nbytes if case.over == "targets" else 0)

    def values(self, objective: str, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        logp = log_softmax_over(self.case.over, z, self.targets)
        loss = (logp * self.upstream.double()).sum()
        return {"logp": logp, "loss": loss}, loss

    def plain(self, gather_first: bool, product: Callable = torch.matmul) -> dict[str, Tensor]:
        """Values and gradients in plain PyTorch, from the logits of the selected rows."""
        hidden, weight = self.leaves()
        z = product(hidden[self.rows], weight.T)
        logp = log_softmax_over(self.case.over, z, self.targets)
        return {"logp": logp.detach(), **gradients(logp, self.upstream, hidden, weight)}


def log_softmax_over(over: str, z: Tensor, targets: Tensor) -> Tensor:  # (M, V), (M, K) -> (M, K)
    if over == "targets":
        return plain.log_softmax(z.gather(-1, targets))
    return plain.log_softmax(z).gather(-1, targets)


def cases(device: str) -> list[KTargetsCase]:
    def pair(name: str, fraction: float, dtype: torch.dtype, **more) -> list[KTargetsCase]:
        return [
            KTargetsCase(f"k20-{name}", fraction, dtype, **more),
            KTargetsCase(f"k20-over-targets-{name}", fraction, dtype, over="targets", **more),
        ]

    half, full = torch.bfloat16, torch.float32
    if device == "cuda":
        return pair("large-30", 0.3, half, N=8192, response=8192, D=4096, V=128256)
    found = pair("bf16-30", 0.3, half) + pair("fp32-30", 0.3, full)
    return found + pair("D2048", 0.3, half, D=2048, long=True)
