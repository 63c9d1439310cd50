"""One file an operation: its cases, their inputs, and the float64 truth they are gated on."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from bench import measure, precision, report
from bench.contender import Contender
from bench.harness import Row

# seconds a call: above it a peer is out of the race, and SLOW_ROUNDS tell by how much
SLOW, SLOW_ROUNDS = 8.0, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the cases of all operations have in common; each adds its name and sizes."""

    kept: ClassVar[bool] = False  # the inputs are made again after the gate
    legend: ClassVar[str] = report.LEGEND
    rounds: ClassVar[int | None] = None  # as many as the run asks for
    only: tuple[str, ...] = ()  # names of contenders; empty: all
    without: tuple[str, ...] = ()  # names left out to save time
    long: bool = False  # only in the full suite, or by name

    @property
    def shape(self) -> dict:
        about = dataclasses.asdict(self) | {"M": getattr(self, "M", None)}
        hidden = "name", "only", "without", "long"
        return {k: str(v) if k == "dtype" else v for k, v in about.items() if k not in hidden}

    def takes(self, contender: Contender) -> bool:
        name = contender.name.partition(":")[0]  # "sepo" in a case's list means all of ours
        return name not in self.without and (not self.only or name in self.only)

    def text(self, rows: list[Row], roof: str, heading: str) -> str:
        return report.table(rows, roof)


class Inputs:
    """What the harness asks of inputs; those of an operation say `due`, `errors` and `limits`."""

    contenders = ()  # the case is told who takes part
    about: ClassVar[dict] = {}
    heading = ""
    baselines: ClassVar[dict[str, dict[str, float]]] = {}  # errors of others, in this dtype
    number = 0  # of the round

    def __init__(self, case, device: str):
        self.case, self.device = case, device

    def passes(self, contender: Contender) -> Iterator[tuple[tuple[str, ...], dict]]:
        """Fields of a row for the errors of a call, and their limits, for each call of the gate."""
        limits = self.limits(contender.ours, contender.objective) if contender.gated else {}
        yield ("errors",), limits

    def result_of(self, contender: Contender) -> dict[str, Tensor]:
        return contender.run(self)

    def ready(self, contender: Contender, row: Row) -> int | None:  # its rounds; None: all
        call = self.call(contender)
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        size = measure.peak_bytes(call, self.device)
        if not contender.gated:
            return None
        row.extra_bytes, row.beyond_gradients_bytes = size, size - self.gradient_bytes
        return SLOW_ROUNDS if not contender.ours and seconds > SLOW else None

    def call(self, contender: Contender) -> partial:
        return partial(contender.run, self)

    def scaled(self, seconds: list[float]) -> list[float]:
        return seconds

    def describe(self, contender: Contender, row: Row, rounds: int) -> None:
        row.flop, row.bytes = self.flop, self.bytes

    def forget(self) -> None:
        """What a failed call has left."""


class HeadInputs(Inputs):
    """Of heads, whose subclasses say `names`, `values` and `plain`; half the rows are confident."""

    def __init__(self, case, device: str):
        super().__init__(case, device)
        self.generator = seeded(device)
        self._truths: dict[str, dict] = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device)

    def drawn_targets(self) -> Tensor:  # (M,)
        size = (self.case.M,)
        return torch.randint(self.case.V, size, generator=self.generator, device=self.device)

    def confident(self, toward: Tensor) -> Tensor:  # rows of the weight -> states of that target
        """The target's logit is log V + 9, the others have spread 1: logp about -1e-4."""
        return toward / toward.square().sum(-1, True) * (math.log(self.case.V) + 9)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """hidden and weight, each asking for a gradient as the case says."""
        hidden = self.hidden.detach().requires_grad_(self.case.leaves != "none")
        return hidden, self.weight.detach().requires_grad_(self.case.leaves == "both")

    @property
    def gradient_bytes(self) -> int:
        return sum(x.nbytes for x in self.leaves() if x.requires_grad)

    @property
    def flop(self) -> float:
        case = self.case
        return case.products * 2.0 * case.M * case.D * case.V

    @property
    def sides(self) -> tuple[tuple[Tensor, Tensor], ...]:  # states and head, of all models
        return ((self.hidden, self.weight),)

    @cached_property
    def operands(self) -> tuple[Tensor, ...]:  # (M, D) and (V, D) of all models
        """Of the bare products: in the dtype that is multiplied fastest, converted once."""
        dtype = precision.quick(self.case.dtype, self.device)
        return tuple(x.to(dtype) for hidden, w in self.sides for x in (hidden[self.rows], w))

    def truth(self, objective: str) -> dict[str, Tensor]:
        """Float64 values and gradients: the straightforward computation, from exact logits."""
        if objective not in self._truths:
            z, *others = (precision.logits(hidden[self.rows], w) for hidden, w in self.sides)
            z.requires_grad_(self.case.leaves != "none")
            found, loss = self.values(objective, z, *others)
            found = {name: value.detach() for name, value in found.items()}
            if z.requires_grad:
                (dz,) = torch.autograd.grad(loss, z)
                del z, others, loss  # each as large as dz
                both, args = self.case.leaves == "both", (self.hidden, self.weight, self.rows)
                found |= precision.gradients(dz, *args, both)
                if both and objective == "weighted":
                    self._once = precision.rounded_once(dz, *args)
            self._truths[objective] = found
        return self._truths[objective]

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Gradient errors of plain PyTorch, and of products whose dZ was rounded once."""
        if self.case.leaves == "none":
            return {}
        self.truth("weighted")
        found = {"plain": self.plain(True, precision.product)}
        if self.case.leaves == "both":
            found["once"] = self._once
        return {name: self.errors(result, "weighted") for name, result in found.items()}

    def due(self, objective: str) -> tuple[str, ...]:
        """What a contender must give to be gated."""
        grads = {"both": ("grad_hidden", "grad_weight"), "hidden": ("grad_hidden",), "none": ()}
        return *self.names(objective), *grads[self.case.leaves]

    def errors(self, result: dict[str, Tensor], objective: str) -> dict[str, float]:
        """Values in nats, gradients relative to the largest entry of the true one."""
        truth = self.truth(objective)
        error = lambda name: (
            precision.relative_error if "grad" in name else precision.absolute_error
        )
        return {name: error(name)(got, truth[name]) for name, got in result.items()}

    def limits(self, ours: bool, objective: str) -> dict[str, float]:
        """The largest errors that are given a speed."""
        limit = 1e-4 if ours else 0.1 if self.case.dtype.itemsize == 2 else 1e-3
        found = precision.limits(self.yardstick(objective), ours, self.case.dtype)
        return found | dict.fromkeys(("logp", "loss", "ref_logp", "kl"), limit)

    def yardstick(self, objective: str) -> dict[str, float]:
        return self.baselines.get("plain", {})


def seeded(device: str) -> torch.Generator | None:
    """Draws the same every time; on "meta", where shapes alone are asked for, there is none."""
    return None if device == "meta" else torch.Generator(device).manual_seed(0)
