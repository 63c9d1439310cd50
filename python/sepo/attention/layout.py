"""The choice of an implementation, and what it makes of one batch."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from sepo.attention import flex, native, sdpa, varlen
from sepo.attention.terms import Arrays, ArraysKey, Attend, AttentionImpl, Span, Terms
from sepo.data.move import moved
from sepo.data.types import PackedBatch
from sepo.errors import InputError

IMPLS = (  # in order of preference
    AttentionImpl(
        "varlen", varlen.absent, varlen.why_not, varlen.build,
        arrays=varlen.arrays, detail=varlen.detail,
    ),
    AttentionImpl(
        "flex", flex.absent, flex.why_not, flex.build, flex.worth_it,
        arrays=flex.arrays, by_window=True,
    ),
    AttentionImpl("native", native.absent, native.why_not, native.build),
    AttentionImpl("sdpa", lambda: None, sdpa.why_not, sdpa.build),
)  # fmt: skip


class PackedLayout:
    """One batch, as the attention of every layer sees it.

    It is made anew for each forward and chooses at the first layer, where device and dtype are
    known; layers of equal terms share what was built then, and nothing of it waits for a device.
    """

    def __init__(self, batch: PackedBatch, attn_impl: str = "auto"):
        self.spans = _spans(batch)
        self.attn_impl = attn_impl
        self.windows: list[
            int | None
        ] = []  # of every layer that has asked, for the check of a model
        self._attend: dict[Terms, Attend] = {}
        self._arrays: dict[ArraysKey, Arrays] = dict(batch.attention)

    def attend(
        self,
        query: Tensor,  # (1, H, N, E)
        key: Tensor,  # (1, H_kv, N, E)
        value: Tensor,  # (1, H_kv, N, E_v)
        *,
        scale: float | None,
        dropout: float = 0.0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # (1, N, H, E_v)
        """Attention of the packed rows. Raises InputError if the implementation wished for can't."""
        self.windows.append(window)
        terms = Terms(
            device=query.device,
            dtype=query.dtype,
            width=query.shape[-1],
            value_width=value.shape[-1],
            gradient=torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
            dropout=dropout,
            window=window,
            softcap=softcap,
        )
        if terms not in self._attend:
            self._attend[terms] = self._built(terms)
        return self._attend[terms](query, key, value, scale)

    def _built(self, terms: Terms) -> Attend:
        impl = choose(self.attn_impl, terms)
        key = impl.key(terms)
        if key not in self._arrays:  # nobody knew, when the batch was packed
            arrays = _from_numpy(impl.arrays(self.spans, terms.window))
            self._arrays[key] = moved(arrays, terms.device)
        return impl.build(self.spans, terms, self._arrays[key])


def with_arrays(
    batch: PackedBatch,  # on the CPU
    needs: Iterable[tuple[str, Terms]],  # attn_impl and terms of layers that will read it
) -> PackedBatch:
    """The batch with the arrays that these layers would else make when they run.

    A need that comes out wrong costs time only: a layer makes what it does not find.
    """
    arrays = dict(batch.attention)
    for attn_impl, terms in needs:
        try:
            impl = choose(attn_impl, terms)
        except InputError:  # the layer says it, of the terms that it really has
            continue
        key = impl.key(terms)
        if key not in arrays and (new := impl.arrays(_spans(batch), terms.window)):
            arrays[key] = _from_numpy(new)
    return replace(batch, attention=arrays)


def _spans(batch: PackedBatch) -> tuple[Span, ...]:
    rows = len(batch.tokens)
    return batch.spans or ((0, rows, rows, rows),)  # no pairs: one row that sees itself


def _from_numpy(arrays: dict) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_name(attn_impl: str) -> None:
    """Raise InputError for a name that is unknown, or that nothing on this machine can run."""
    for impl in IMPLS:
        if impl.name == attn_impl and (reason := impl.absent()):
            raise InputError(f"attn_impl={attn_impl} cannot run here: {reason}")
    if attn_impl not in (known := ["auto", *(impl.name for impl in IMPLS)]):
        raise InputError(f"expected attn_impl to be one of {', '.join(known)}, got {attn_impl}")


def choose(attn_impl: str, terms: Terms) -> AttentionImpl:
    """The implementation of that name, or for "auto" the first that can run and is worth it.

    Raises InputError if the one named can't serve the terms: it never falls back.
    """
    if attn_impl == "auto":
        return next(i for i in IMPLS if i.worth_it(terms) and i.why_not(terms) is None)
    check_name(attn_impl)
    impl = next(impl for impl in IMPLS if impl.name == attn_impl)
    if reason := impl.why_not(terms):
        raise InputError(f"attn_impl={attn_impl} cannot run here: {reason}")
    return impl


def explain(attn_impl: str, terms: Terms) -> str:
    """One line: the implementation chosen for these terms and why not one before it."""
    chosen = choose(attn_impl, terms)
    detail = chosen.detail(terms)
    name = f"{chosen.name} ({detail})" if detail else chosen.name
    if attn_impl != "auto":
        return f"{name}, as asked"
    before = IMPLS[: IMPLS.index(chosen)]
    reasons = {i.name: i.why_not(terms) or "slower here" for i in before}
    return "; ".join([name, *(f"not {n}: {reason}" for n, reason in reasons.items())])
