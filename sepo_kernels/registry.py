"""Choosing an implementation: a tuple in priority order, and one function that reads it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch


@dataclass(frozen=True)
class Impl:
    """One implementation of an operation; `bwd` is None where the operation has no gradient."""

    name: str  # what the user writes: impl="chunked"
    fwd: Callable[..., Any]
    bwd: Callable[..., Any] | None
    why_not: Callable[..., str | None]  # None: can run this call; else the reason
    # of a head: whether the logits of this dtype never leave the cache
    fused: Callable[[torch.dtype], bool] = lambda dtype: False


SomeImpl = TypeVar("SomeImpl", bound=Impl)


def always(*call: Any) -> None:
    """Return None: the `why_not` of an implementation that runs everywhere."""


def pick(
    impls: Sequence[SomeImpl],
    requested: str,
    *call: Any,  # what their `why_not` reads: tensors, and settings that not all of them have
) -> SomeImpl:
    """Return the requested implementation, or for "auto" the first that can run `call`.

    A named implementation that cannot run is an error with its reason: it never falls back.
    """
    if requested == "auto":
        reasons = {}
        for impl in impls:
            reason = impl.why_not(*call)
            if reason is None:
                return impl
            reasons[impl.name] = reason
        raise ValueError(f"no implementation can run these tensors: {reasons}")
    for impl in impls:
        if impl.name == requested:
            reason = impl.why_not(*call)
            if reason is not None:
                raise ValueError(f'impl="{requested}" cannot run here: {reason}')
            return impl
    known = ", ".join(["auto", *(impl.name for impl in impls)])
    raise ValueError(f'unknown impl "{requested}", expected one of: {known}')
