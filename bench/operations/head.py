"""selected_logprob: forward and backward of the log-probabilities of the selected tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench import dtypes, exact, plain
from bench.operations import seeded
from bench.provider import gradients

BETA, GAMMA = 0.1, 0.5  # the defaults of Liger's SimPO and DPO


@dataclass(frozen=True)
class HeadCase:
    suite: ClassVar[str] = "head"
    name: str
    fraction: float  # of the response's rows that are selected
    dtype: torch.dtype
    N: int = 2048  # rows of the buffer: `segments` sequences of equal length, no padding
    response: int = 1536  # rows that predict a response's token; the rest is prompt
    D: int = 576
    V: int = 49152
    segments: int = 8  # sequences, chosen ones first, as Liger wants them
    leaves: str = "both"  # what needs a gradient: "both" | "hidden" | "none"
    only: tuple[str, ...] = ()  # names of providers; empty: all
    without: tuple[str, ...] = ()  # names left out to save time
    long: bool = False  # only in the full suite, or by name

    @property
    def M(self) -> int:
        return math.floor(self.fraction * self.response + 1e-9)

    @property
    def products(self) -> int:  # matrix products of 2 M D V FLOP that the work cannot do without
        return {"both": 3, "hidden": 2, "none": 1}[self.leaves]

    def inputs(self, device: str) -> "HeadInputs":
        return HeadInputs(self, device)


class HeadInputs:
    """Rows that training has: half confident (logp near 0), half with an unlikely target."""

    def __init__(self, case: HeadCase, device: str):
        self.case, self.device = case, device
        g = seeded(device)
        normal = lambda *shape: torch.randn(*shape, generator=g, device=device)
        length, prompt = case.N // case.segments, (case.N - case.response) // case.segments
        starts = length * torch.arange(case.segments, device=device)
        candidates = (starts[:, None] + torch.arange(prompt, length, device=device)).flatten()
        order = torch.randperm(len(candidates), generator=g, device=device)
        rows = candidates[order[: case.M]].sort().values
        self.rows = rows.int()  # (M,)
        self.targets = torch.randint(case.V, (case.M,), generator=g, device=device)
        self.weight = (normal(case.V, case.D) / case.D**0.5).to(case.dtype)
        hidden = normal(case.N, case.D)
        toward = self.weight[self.targets[::2]].float()  # of the confident
        # the target's logit is log V + 9, the others have spread 1: logp about -1e-4
        hidden[rows[::2]] = toward / toward.square().sum(-1, True) * (math.log(case.V) + 9)
        self.hidden = hidden.to(case.dtype)
        self.labels = torch.full((case.N,), -100, device=device).index_put_((rows,), self.targets)
        self.upstream = normal(case.M)
        self._truths: dict[str, dict] = {}

    def leaves(self) -> tuple[Tensor, Tensor]:
        """hidden and weight, each asking for a gradient as the case says."""
        hidden = self.hidden.detach().requires_grad_(self.case.leaves != "none")
        return hidden, self.weight.detach().requires_grad_(self.case.leaves == "both")

    @property
    def gradient_bytes(self) -> int:
        wanted = [x for x in self.leaves() if x.requires_grad]
        return sum(x.numel() * x.element_size() for x in wanted)

    @property
    def flop(self) -> float:
        case = self.case
        return case.products * 2.0 * case.M * case.D * case.V

    @property
    def bytes(self) -> float:
        """Weight, selected rows, places, targets and values; the gradients."""
        read = self.case.M * (self.case.D * self.hidden.element_size() + 4 + 8 + 4)
        upstream = 4 * self.case.M if self.gradient_bytes else 0
        return self.weight.nbytes + read + upstream + self.gradient_bytes

    @cached_property
    def gathered(self) -> Tensor:  # (M, D)
        return self.hidden[self.rows]

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor]:  # (M, D), (V, D)
        """Of the bare products: in the dtype that the machine multiplies fastest, converted once."""
        dtype = dtypes.quick(self.case.dtype, self.device)
        return self.gathered.to(dtype), self.weight.to(dtype)

    @cached_property
    def log_softmax(self) -> Tensor:  # (M, V) float64
        z = exact.logits(self.gathered, self.weight)
        return z.sub_(z.logsumexp(-1, keepdim=True))

    @cached_property
    def logp(self) -> Tensor:  # (M,) float64
        return self.log_softmax.gather(-1, self.targets[:, None])[:, 0]

    def d_logits(self, upstream: Tensor) -> Tensor:  # (M,) -> (M, V) float64
        dz = self.log_softmax.exp().mul_(-upstream[:, None])
        return dz.scatter_add_(1, self.targets[:, None], upstream[:, None])

    def truth(self, objective: str) -> dict[str, Tensor]:
        """Float64 values and gradients of one of OBJECTIVES."""
        if objective not in self._truths:
            leaf = self.logp.detach().requires_grad_()
            loss = OBJECTIVES[objective](leaf, self)
            found = {"logp": self.logp, "loss": loss.detach()}
            if self.case.leaves != "none":
                (upstream,) = torch.autograd.grad(loss, leaf)
                args = self.hidden, self.weight, self.rows, self.case.leaves == "both"
                found |= exact.gradients(self.d_logits(upstream), *args)
            self._truths[objective] = found
        return self._truths[objective]

    def due(self, objective: str) -> tuple[str, ...]:
        """What a provider must give to be gated."""
        grads = {"both": ("grad_hidden", "grad_weight"), "hidden": ("grad_hidden",), "none": ()}
        return ("logp" if objective == "weighted" else "loss", *grads[self.case.leaves])

    def errors(self, result: dict[str, Tensor], objective: str) -> dict[str, float]:
        """logp and loss in nats, gradients relative to the largest entry of the true one."""
        truth = self.truth(objective)
        measure = lambda name: exact.relative_error if "grad" in name else exact.absolute_error
        return {name: measure(name)(got, truth[name]) for name, got in result.items()}

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        """The largest errors that are given a speed."""
        value = 1e-4 if ours else 0.1 if self.case.dtype.itemsize == 2 else 1e-3
        plain = self.baselines.get("plain", {})
        return {"logp": value, "loss": value} | exact.gradient_limits(plain, ours, self.case.dtype)

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Gradient errors of plain PyTorch, and of products whose dZ was rounded once."""
        if self.case.leaves == "none":
            return {}
        hidden, weight = self.leaves()
        args = hidden, weight, self.rows, self.targets
        logp = plain.selected_logprob(*args, gather_first=True, product=dtypes.product)
        unfused = gradients(logp, self.upstream, hidden, weight)
        found = {"plain": unfused}
        if self.case.leaves == "both":
            dz = self.d_logits(self.upstream.double())
            found["once"] = exact.rounded_once(dz, self.hidden, self.weight, self.rows)
        return {name: self.errors(grads, "weighted") for name, grads in found.items()}


def _segments(logp: Tensor, inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Sum of logp and number of selected tokens of each segment, (S,) both."""
    case = inputs.case
    segment = inputs.rows.long() // (case.N // case.segments)
    zero = logp.new_zeros(case.segments)
    return zero.index_add(0, segment, logp), zero.index_add(0, segment, torch.ones_like(logp))


def _simpo(logp: Tensor, inputs: HeadInputs) -> Tensor:
    total, count = _segments(logp, inputs)
    chosen, rejected = (total / count).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def _dpo(logp: Tensor, inputs: HeadInputs) -> Tensor:
    chosen, rejected = _segments(logp, inputs)[0].chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


# what a provider differentiates, as a function of logp (M,) float64
OBJECTIVES: dict[str, Callable[[Tensor, HeadInputs], Tensor]] = {
    "weighted": lambda logp, inputs: logp @ inputs.upstream.double(),
    "mean": lambda logp, inputs: -logp.mean(),
    "simpo": _simpo,
    "dpo": _dpo,
}


def cases(device: str) -> list[HeadCase]:
    half, full = torch.bfloat16, torch.float32
    # DPO's head is SimPO's, and what reads every row takes the same time for any fraction: on two
    # cores once is enough
    few = dict(without=("liger_dpo",))
    if device == "cpu":
        few["only"] = ("gemm", "sepo", "dense_gathered", "torch_lce", "cce")
    all_rows = {**few, "only": (*few["only"], "dense", "liger_simpo")} if "only" in few else few
    found = [
        HeadCase("head-bf16-30", 0.3, half),
        HeadCase("head-bf16-100", 1.0, half, **all_rows),
        HeadCase("head-bf16-50", 0.5, half, **few),
        HeadCase("head-bf16-15", 0.15, half, **few),
        HeadCase("head-fp32-30", 0.3, full, without=("liger_dpo",)),
        HeadCase("head-fp32-100", 1.0, full, long=True, **all_rows),
        HeadCase("head-fp32-50", 0.5, full, long=True, **few),
        HeadCase("head-fp32-15", 0.15, full, long=True, **few),
        HeadCase("head-frozen-30", 0.3, half, leaves="hidden", **few),
        HeadCase("head-nograd-30", 0.3, half, leaves="none", **few),
    ]
    if device == "cuda":
        large = dict(dtype=half, N=8192, response=8192, D=4096, V=128256)
        return found + [
            HeadCase("head-large-30", 0.3, **large),
            HeadCase("head-large-100", 1.0, **large),
            HeadCase("head-large-frozen-30", 0.3, leaves="hidden", **large),
        ]
    rows = dict(fraction=1.0, dtype=half, N=512, response=512, only=("gemm", "sepo"))
    return found + [
        HeadCase("head-D2048", D=2048, V=50304, **rows),
        HeadCase("head-D4096", D=4096, V=128256, long=True, **rows),
    ]
