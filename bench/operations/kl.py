"""selected_logprob_kl: log-probabilities under two heads and their divergence, per token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bench import plain, precision
from bench.contender import gradients
from bench.operations import Case, HeadInputs

DIRECTIONS = ("ref||policy", "policy||ref")
JSD = ("jsd", 0.5)


@dataclass(frozen=True)
class KLCase(Case):
    suite: ClassVar[str] = "head"
    leaves: ClassVar[str] = "both"
    products: ClassVar[int] = 4  # the logits of both heads, dX, dW
    name: str
    direction: str | tuple[str, float]
    dtype: torch.dtype = torch.bfloat16
    N: int = 2048
    M: int = 460
    D: int = 576
    V: int = 49152

    def inputs(self, device: str) -> "KLInputs":
        return KLInputs(self, device)


class KLInputs(HeadInputs):
    """A policy near its reference: logits differ by about 0.15 nats; half the rows are confident."""

    def __init__(self, case: KLCase, device: str):
        super().__init__(case, device)
        rows, normal = self.shuffled(case.N)[: case.M].sort().values, self.normal
        self.rows = rows.int()  # (M,)
        self.targets = self.drawn_targets()  # (M,)
        weight, hidden = normal(case.V, case.D) / case.D**0.5, normal(case.N, case.D)
        hidden[rows[::2]] = self.confident(weight[self.targets[::2]])
        self.hidden, self.weight = hidden.to(case.dtype), weight.to(case.dtype)
        self.ref_hidden = (hidden + 0.1 * normal(*hidden.shape)).to(case.dtype)
        self.ref_weight = (weight + 0.1 / case.D**0.5 * normal(*weight.shape)).to(case.dtype)
        self.upstream, self.upstream_kl = normal(case.M), normal(case.M)

    def plain(
        self,
        gather_first: bool,
        product: Callable = torch.matmul,
        objective: str = "weighted",
    ) -> dict[str, Tensor]:
        """Values and gradients by softmax of both logits, in plain PyTorch."""
        hidden, weight = self.leaves()
        logp, ref_logp, kl = plain.selected_logprob_kl(
            hidden, weight, self.ref_hidden, self.ref_weight, self.rows, self.targets,
            direction=self.case.direction, gather_first=gather_first, product=product,
        )  # fmt: skip
        return self.result(logp, ref_logp, kl, hidden, weight, objective)

    def result(self, logp, ref_logp, kl, hidden, weight, objective="weighted") -> dict[str, Tensor]:
        """What the gate compares; gradients are those of a weighted sum of logp and kl, or of kl."""
        loss = self._loss(logp, kl, objective)
        values = {"logp": logp.detach(), "ref_logp": ref_logp.detach(), "kl": kl.detach()}
        return values | gradients(loss, None, hidden, weight)

    @property
    def bytes(self) -> float:
        """Both weights, the selected rows of both, places, targets, values; the gradients."""
        rows = self.case.M * (2 * self.case.D * self.hidden.element_size() + 4 + 8 + 3 * 4 + 2 * 4)
        return self.weight.nbytes + self.ref_weight.nbytes + rows + self.gradient_bytes

    @property
    def sides(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return (self.hidden, self.weight), (self.ref_hidden, self.ref_weight)

    def names(self, objective: str) -> tuple[str, ...]:
        return ("kl",) if objective == "kl" else ("logp", "ref_logp", "kl")

    def values(
        self, objective: str, z: Tensor, ref_z: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:  # of a weighted sum of logp and kl, or of the kl alone
        log_p, log_q = plain.log_softmax(z), plain.log_softmax(ref_z)
        logp, ref_logp = (plain.of_targets(log, self.targets) for log in (log_p, log_q))
        kl = plain.divergence(log_p, log_q, self.case.direction)
        return {"logp": logp, "ref_logp": ref_logp, "kl": kl}, self._loss(logp, kl, objective)

    def _loss(self, logp: Tensor, kl: Tensor, objective: str) -> Tensor:  # of rows at the start
        both = self.upstream, self.upstream_kl
        upstream, upstream_kl = (x[: len(kl)].to(kl.dtype) for x in both)
        loss = kl @ upstream_kl
        return loss if objective == "kl" else logp @ upstream + loss

    def yardstick(self, objective: str) -> dict[str, float]:
        return self.baselines["plain"] if objective == "weighted" else self._plain_kl

    @cached_property
    def _plain_kl(self) -> dict[str, float]:
        """Of the KL's gradient alone, which is a difference of like numbers, and smaller."""
        return self.errors(self.plain(True, precision.product, "kl"), "kl")


def cases(device: str) -> list[KLCase]:
    name = lambda direction: "jsd" if direction == JSD else direction.replace("||", "-")
    # the softmax of every row takes the same time in both directions: once is enough
    half = (*DIRECTIONS, JSD) if device == "cpu" else DIRECTIONS
    again = ("softmax_both",) if device == "cpu" else ()
    found = [KLCase(f"kl-{name(d)}", d, without=() if d == DIRECTIONS[0] else again) for d in half]
    full = dict(dtype=torch.float32, without=("softmax_both",), long=True)
    # on a GPU, whose time is short, it has the place of a second KL
    fp32 = (*DIRECTIONS, JSD) if device == "cpu" else (DIRECTIONS[0], JSD)
    found += [KLCase(f"kl-fp32-{name(d)}", d, **full) for d in fp32]
    if device == "cuda":
        only = ("gemm", "sepo", "softmax_both_gathered", "trl_divergence")
        large = dict(N=8192, M=4096, D=4096, V=128256, only=only)
        found += [KLCase(f"kl-large-50-{name(d)}", d, **large) for d in DIRECTIONS]
    return found
