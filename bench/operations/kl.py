"""selected_logprob_kl: log-probabilities under two heads and the KL between them, per token."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bench import dtypes, exact, plain
from bench.operations import seeded
from bench.provider import gradients

DIRECTIONS = ("ref||policy", "policy||ref")


@dataclass(frozen=True)
class KLCase:
    suite: ClassVar[str] = "head"
    name: str
    direction: str
    dtype: torch.dtype = torch.bfloat16
    N: int = 2048
    M: int = 460
    D: int = 576
    V: int = 49152
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    long: bool = False

    @property
    def products(self) -> int:  # the logits of both heads, dX, dW
        return 4

    def inputs(self, device: str) -> "KLInputs":
        return KLInputs(self, device)


class KLInputs:
    """A policy near its reference: logits differ by about 0.15 nats; half the rows are confident."""

    def __init__(self, case: KLCase, device: str):
        self.case, self.device = case, device
        g = seeded(device)
        normal = lambda *shape: torch.randn(*shape, generator=g, device=device)
        rows = torch.randperm(case.N, generator=g, device=device)[: case.M].sort().values
        self.rows = rows.int()  # (M,)
        self.targets = torch.randint(case.V, (case.M,), generator=g, device=device)
        weight = normal(case.V, case.D) / case.D**0.5
        hidden = normal(case.N, case.D)
        toward = weight[self.targets[::2]]  # of the confident
        hidden[rows[::2]] = toward / toward.square().sum(-1, True) * (math.log(case.V) + 9)
        self.hidden, self.weight = hidden.to(case.dtype), weight.to(case.dtype)
        self.ref_hidden = (hidden + 0.1 * normal(*hidden.shape)).to(case.dtype)
        self.ref_weight = (weight + 0.1 / case.D**0.5 * normal(*weight.shape)).to(case.dtype)
        self.upstream, self.upstream_kl = normal(case.M), normal(case.M)
        self._truths: dict[str, dict] = {}

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

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
        loss = kl @ self.upstream_kl[: len(kl)]
        if objective == "weighted":
            loss = logp @ self.upstream[: len(logp)] + loss
        values = {"logp": logp.detach(), "ref_logp": ref_logp.detach(), "kl": kl.detach()}
        return values | gradients(loss, None, hidden, weight)

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.weight))

    @property
    def flop(self) -> float:
        case = self.case
        return case.products * 2.0 * case.M * case.D * case.V

    @property
    def bytes(self) -> float:
        """Both weights, the selected rows of both, places, targets, values; the gradients."""
        rows = self.case.M * (2 * self.case.D * self.hidden.element_size() + 4 + 8 + 3 * 4 + 2 * 4)
        return self.weight.nbytes + self.ref_weight.nbytes + rows + self.gradient_bytes

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor]:  # (M, D) of the policy and of the reference
        return self.hidden[self.rows], self.ref_hidden[self.rows]

    @cached_property
    def operands(self) -> tuple[Tensor, ...]:  # (M, D), (V, D), and both of the reference
        """Of the bare products: in the dtype that the machine multiplies fastest, converted once."""
        dtype, (x, ref_x) = dtypes.quick(self.case.dtype, self.device), self.gathered
        return tuple(a.to(dtype) for a in (x, self.weight, ref_x, self.ref_weight))

    def _exact(self, objective: str) -> tuple[dict[str, Tensor], Tensor]:
        """Values, (M,) each, and the gradient of the objective by the logits."""
        x, ref_x = self.gathered
        log_p, log_q = exact.logits(x, self.weight), exact.logits(ref_x, self.ref_weight)
        for z in (log_p, log_q):
            z.sub_(z.logsumexp(-1, keepdim=True))
        index = self.targets[:, None]
        values = {name: z.gather(-1, index)[:, 0] for name, z in
                  (("logp", log_p), ("ref_logp", log_q))}  # fmt: skip
        p = log_p.exp()
        if self.case.direction == "ref||policy":
            q = log_q.exp()
            values["kl"] = (q * (log_q - log_p)).sum(-1)
            dz = (p - q).mul_(self.upstream_kl[:, None])
        else:
            gap = log_p - log_q
            values["kl"] = (p * gap).sum(-1)
            dz = gap.sub_(values["kl"][:, None]).mul_(p).mul_(self.upstream_kl[:, None])
        if objective == "kl":
            return values, dz
        dz -= p * self.upstream[:, None]
        return values, dz.scatter_add_(1, index, self.upstream.double()[:, None])

    def truth(self, objective: str) -> dict[str, Tensor]:
        """Float64 values, and gradients of a weighted sum of logp and kl, or of the kl alone."""
        if objective not in self._truths:
            values, dz = self._exact(objective)
            if objective == "weighted":
                self._once = exact.rounded_once(dz, self.hidden, self.weight, self.rows)
            grads = exact.gradients(dz, self.hidden, self.weight, self.rows, True)
            self._truths[objective] = values | grads
        return self._truths[objective]

    def due(self, objective: str) -> tuple[str, ...]:
        """What a provider must give to be gated."""
        values = ("kl",) if objective == "kl" else ("logp", "ref_logp", "kl")
        return (*values, "grad_hidden", "grad_weight")

    def errors(self, result: dict[str, Tensor], objective: str) -> dict[str, float]:
        """logp, ref_logp and kl in nats, gradients relative to the largest entry of the true one."""
        measure = lambda name: exact.relative_error if "grad" in name else exact.absolute_error
        truth = self.truth(objective)
        return {name: measure(name)(got, truth[name]) for name, got in result.items()}

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        """The largest errors that are given a speed."""
        value = 1e-4 if ours else 0.1 if self.case.dtype.itemsize == 2 else 1e-3
        values = dict.fromkeys(("logp", "ref_logp", "kl"), value)
        plain = self.baselines["plain"] if objective == "weighted" else self._plain_kl
        return values | exact.gradient_limits(plain, ours, self.case.dtype)

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        self.truth("weighted")
        plain = self.plain(gather_first=True, product=dtypes.product)
        found = {"plain": plain, "once": self._once}
        return {name: self.errors(result, "weighted") for name, result in found.items()}

    @cached_property
    def _plain_kl(self) -> dict[str, float]:
        """Of the KL's gradient alone, which is a difference of like numbers, and smaller."""
        return self.errors(self.plain(True, dtypes.product, "kl"), "kl")


def cases(device: str) -> list[KLCase]:
    name = lambda direction: direction.replace("||", "-")
    # the softmax of every row takes the same time in both directions: once is enough
    without = ((), ("softmax_both",) if device == "cpu" else ())
    found = [
        KLCase(f"kl-{name(d)}", d, without=w) for d, w in zip(DIRECTIONS, without, strict=True)
    ]
    full = dict(dtype=torch.float32, without=("softmax_both",), long=True)
    found += [KLCase(f"kl-fp32-{name(d)}", d, **full) for d in DIRECTIONS]
    if device == "cuda":
        only = ("gemm", "sepo", "softmax_both_gathered", "trl_divergence")
        large = dict(N=8192, M=4096, D=4096, V=128256, only=only)
        found += [KLCase(f"kl-large-50-{name(d)}", d, **large) for d in DIRECTIONS]
    return found
