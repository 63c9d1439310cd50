"""One contender: what it runs, whether it can run here, and which version it is."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch


def _always(inputs) -> None: ...


def _nothing(inputs) -> str:
    return ""


@dataclass(frozen=True)
class Provider:
    name: str
    run: Callable  # inputs -> dict of the values and gradients that the gate compares
    why_not: Callable = _always  # inputs -> None: can run here; else the reason
    version: Callable[[], str] = lambda: f"torch {torch.__version__}"
    objective: str = "weighted"  # what it differentiates: a key of OBJECTIVES in operations/head.py
    ours: bool = False  # held to our limits, and a failure of the run if they are missed
    gated: bool = True  # bare products and copies have no value to be wrong
    note: Callable = _nothing  # inputs -> words for the table
    work: Callable = _nothing  # inputs, seconds -> a rate; "" where it says nothing


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
