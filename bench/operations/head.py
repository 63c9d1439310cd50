"""selected_logprob: forward and backward of the log-probabilities of the selected tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench import plain
from bench.contender import gradients
from bench.operations import Case, HeadInputs

BETA, GAMMA = 0.1, 0.5  # the defaults of Liger's SimPO and DPO


@dataclass(frozen=True)
class HeadCase(Case):
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

    @property
    def M(self) -> int:
        return math.floor(self.fraction * self.response + 1e-9)

    @property
    def products(self) -> int:  # matrix products of 2 M D V FLOP that the work cannot do without
        return {"both": 3, "hidden": 2, "none": 1}[self.leaves]

    def inputs(self, device: str) -> "LogprobInputs":
        return LogprobInputs(self, device)


class LogprobInputs(HeadInputs):
    """Rows that training has: half confident (logp near 0), half with an unlikely target."""

    def __init__(self, case: HeadCase, device: str):
        super().__init__(case, device)
        length, prompt = case.N // case.segments, (case.N - case.response) // case.segments
        starts = length * torch.arange(case.segments, device=device)
        candidates = (starts[:, None] + torch.arange(prompt, length, device=device)).flatten()
        rows = candidates[self.shuffled(len(candidates))[: case.M]].sort().values
        self.rows = rows.int()  # (M,)
        self.targets = self.drawn_targets()  # (M,)
        self.weight = (self.normal(case.V, case.D) / case.D**0.5).to(case.dtype)
        hidden = self.normal(case.N, case.D)
        hidden[rows[::2]] = self.confident(self.weight[self.targets[::2]].float())
        self.hidden = hidden.to(case.dtype)
        self.labels = torch.full((case.N,), -100, device=device).index_put_((rows,), self.targets)
        self.upstream = self.normal(case.M)

    @property
    def bytes(self) -> float:
        """Weight, selected rows, places, targets and values; the gradients."""
        read = self.case.M * (self.case.D * self.hidden.element_size() + 4 + 8 + 4)
        upstream = 4 * self.case.M if self.gradient_bytes else 0
        return self.weight.nbytes + read + upstream + self.gradient_bytes

    def names(self, objective: str) -> tuple[str, ...]:
        return ("logp" if objective == "weighted" else "loss",)

    def values(self, objective: str, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """From the logits (M, V) of one of OBJECTIVES, and what is differentiated."""
        logp = plain.of_targets(plain.log_softmax(z), self.targets)
        loss = OBJECTIVES[objective](logp, self)
        return {"logp": logp, "loss": loss}, loss

    def plain(self, gather_first: bool, product: Callable = torch.matmul) -> dict[str, Tensor]:
        """Values and gradients in plain PyTorch."""
        hidden, weight = self.leaves()
        args = hidden, weight, self.rows, self.targets
        logp = plain.selected_logprob(*args, gather_first=gather_first, product=product)
        return {"logp": logp.detach(), **gradients(logp, self.upstream, hidden, weight)}


def _segments(logp: Tensor, inputs: LogprobInputs) -> tuple[Tensor, Tensor]:
    """Sum of logp and number of selected tokens of each segment, (S,) both."""
    case = inputs.case
    segment = inputs.rows.long() // (case.N // case.segments)
    zero = logp.new_zeros(case.segments)
    return zero.index_add(0, segment, logp), zero.index_add(0, segment, torch.ones_like(logp))


def _simpo(logp: Tensor, inputs: LogprobInputs) -> Tensor:
    total, count = _segments(logp, inputs)
    chosen, rejected = (total / count).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def _dpo(logp: Tensor, inputs: LogprobInputs) -> Tensor:
    chosen, rejected = _segments(logp, inputs)[0].chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


# what a provider differentiates, as a function of logp (M,) float64
OBJECTIVES: dict[str, Callable[[Tensor, LogprobInputs], Tensor]] = {
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
