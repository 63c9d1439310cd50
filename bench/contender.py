"""One contender: what it runs, whether it can run here, and what it is."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _nothing(*inputs) -> str:
    return ""


@dataclass
class Contender:
    """Of an operation or of a whole step; the last six fields are a step's."""

    name: str
    # an operation's inputs -> dict of the values and gradients that the gate compares; a step's
    # round -> its loss, with gradients added to the shared weights: all have one end of a step
    run: Callable[[Any], Any] | None  # None: it can't run here
    why_not: Callable = _nothing  # inputs -> the reason why it can't run here, if there is one
    version: Callable[[], str] = lambda: f"torch {torch.__version__}"
    objective: str = "weighted"  # what it differentiates, of operations.head.OBJECTIVES; a method
    ours: bool = False  # held to our limits, and a failure of the run if they are missed
    gated: bool = True  # bare products and copies have no value to be wrong
    note: Callable = _nothing  # inputs -> words for the table
    rate: Callable = _nothing  # inputs, seconds -> words; "" where it says nothing
    rounds: int | None = None  # timed at most; None: all; 0: its memory alone is asked for
    group: str = ""  # "trl" | "dense" | "sepo" | "savings"
    attention: str = ""  # the implementation, where the name leaves it open
    work: Callable[[int], Any] | None = None  # round -> steps.work.Work
    lower: Callable[[], None] = lambda: None  # from float32, where the gate compares, to bfloat16
    float32: bool = True  # it can be compared in float32
    keeps_bytes: int = 0  # beside the policy: a reference model

    @property
    def label(self) -> str:
        """No other's."""
        return f"{self.name} ({self.attention})" if self.attention else self.name


def installed(package: str) -> Callable[[], str]:
    """Version of an installed package, read when it is asked for."""
    return lambda: f"{package} {importlib.metadata.version(package)}"


def missing(package: str) -> str | None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"


def gradients(value, upstream, hidden, weight) -> dict:
    """Gradients of `value` by those of the two that ask for one, by name."""
    leaves = {"grad_hidden": hidden, "grad_weight": weight}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    if not leaves or not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value, list(leaves.values()), upstream)
    return dict(zip(leaves, grads, strict=True))
