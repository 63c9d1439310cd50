"""split_linear and split_logprob: float32 products at the rate of 16-bit ones, without a gradient.

Reading order: what is made once of a weight, the two operations, their explanation, the boundary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sepo.ops._checks import check_one_device
from sepo.ops._selected_logprob import selected_logprob
from sepo_kernels import devices
from sepo_kernels.halves import KINDS, halves, kind_of, side_by_side, weight_halves
from sepo_kernels.registry import pick
from sepo_kernels.split_linear import IMPLS
from sepo_kernels.split_linear.library import short_products


class SplitWeight(NamedTuple):
    """Hold a float32 weight as a sum of two short numbers each, made once by `split_weight`.

    Attributes:
        hi: (V, D) bfloat16; or float32 whose last 13 bits are zero, for TF32.
        lo: (V, D) what is left, as hi; None where it is zero everywhere.
    """

    hi: Tensor  # (V, D)
    lo: Tensor | None  # (V, D)

    @property
    def products(self) -> int:
        """Return how many short products make up one of float32 numbers."""
        return 2 if self.lo is None else 3


def split_weight(
    weight: Tensor,  # (V, D) float32
    *,
    kind: str = "bfloat16",  # or "tf32"
) -> SplitWeight:
    """Return the halves of a weight: hi, the nearest short number, and lo, the nearest to the rest.

    Where every lo is zero, as in a checkpoint of bfloat16 numbers, it is left out: two products are
    enough then. That is found here, at the price of one synchronisation.

    Args:
        weight: (V, D) float32, of a linear layer or a head.
        kind: what a half is: "bfloat16", of 8 bits, or "tf32", of 11.

    Returns:
        SplitWeight: 2 or 4 bytes a number for bfloat16, 4 or 8 for TF32.

    Raises:
        ValueError: for another dtype or shape, and for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {kind}")
    if weight.ndim != 2 or weight.dtype != torch.float32:
        raise ValueError(
            f"expected weight (V, D) torch.float32, got {tuple(weight.shape)} {weight.dtype}"
        )
    return SplitWeight(*weight_halves(weight.detach(), kind))


def split_linear(
    x: Tensor,  # (N, D) float32
    weight: SplitWeight,  # of (V, D)
    *,
    bias: Tensor | None = None,  # (V,) float32
    impl: str = "auto",
) -> Tensor:  # (N, V) float32
    """Return x @ weight.T + bias from products of short halves, which are summed in float32.

    x_hi W_hi + x_lo W_hi + x_hi W_lo, where hi is the nearest bfloat16 and lo the nearest to what
    is left. The error is about 2^-16 of sum |x| |W| (2^-22 for TF32), and that of a float32 sum of
    three times as many terms. It is not finite where float32's product is not. No gradient.

    Args:
        x: (N, D) float32 with contiguous rows; its halves are made here.
        weight: the halves of (V, D), as `split_weight` made them.
        bias: (V,) float32.
        impl: "auto", or a name of an implementation: "library", "triton".

    Returns:
        Tensor: (N, V) float32.

    Raises:
        ValueError: for shapes, strides, dtypes or devices that do not fit, for an input that
            requires a gradient, and for an `impl` that is unknown or cannot run.
    """
    _check(x, weight, bias)
    chosen = pick(IMPLS, impl, x, weight.hi)
    return _fwd(x, weight.hi, weight.lo, bias, chosen.name)


def split_logprob(
    hidden: Tensor,  # (N, D) float32, after the final norm
    weight: SplitWeight,  # of the head, (V, D)
    rows: Tensor,  # (M,) int32 or int64
    targets: Tensor,  # (M,) int64
    *,
    bias: Tensor | None = None,  # (V,) float32
    scale: float = 1.0,
    softcap: float | None = None,
    budget: int | None = None,  # bytes
    impl: str = "auto",
) -> Tensor:  # (M,) float32 nats
    """Return `selected_logprob` of a float32 head whose logits are products of halves.

    The halves lie side by side, so that one product of two or three times the width makes the sum,
    and all of `selected_logprob`'s kernels serve. No gradient.

    Args:
        hidden: (N, D) float32 with contiguous rows, the states after the final norm.
        weight: the head's halves, as `split_weight` made them.
        rows: (M,) int32 or int64, the states that predict.
        targets: (M,) int64, the token ids that they predict.
        bias: (V,) float32 of the head.
        scale: a number that multiplies the logits before the bias.
        softcap: logits = softcap * tanh(logits / softcap); None: not.
        budget: bytes of logits alive at once; None: as of `selected_logprob`.
        impl: "auto", or a name of one of `selected_logprob`'s implementations.

    Returns:
        Tensor: (M,) float32, natural logarithms.

    Raises:
        ValueError: as `split_linear` and `selected_logprob`.
    """
    _check(hidden, weight, bias)
    kind = kind_of(weight.hi)
    left, right = side_by_side(halves(hidden, kind), weight)
    if bias is not None:  # two more columns: the operation's own would be rounded to a half
        left = torch.cat([left, left.new_ones((left.shape[0], 2))], 1)
        columns = [half[:, None] for half in halves(bias / scale, kind)]
        right = torch.cat([right, *columns], 1)
    with short_products(weight.hi):
        return selected_logprob(
            left, right, rows, targets, scale=scale, softcap=softcap, budget=budget, impl=impl
        )


class SplitExplanation(NamedTuple):
    """Name what `split_linear` would do, and why.

    Attributes:
        impl: the implementation's name.
        products: of short numbers, for one of float32 numbers: 2 or 3.
        emulated: whether the device lacks such products, so that float32 itself is faster.
        reasons: of both, a sentence each.
    """

    impl: str
    products: int
    emulated: bool
    reasons: tuple[str, ...]


def explain_split_linear(
    x: Tensor,  # (N, D) float32
    weight: SplitWeight,  # of (V, D)
    *,
    bias: Tensor | None = None,  # (V,) float32
    impl: str = "auto",
) -> SplitExplanation:
    """Return how `split_linear` makes the products of the same arguments; computes nothing.

    Args:
        x: (N, D) float32.
        weight: the halves of (V, D).
        bias: (V,) float32.
        impl: "auto", or a name of an implementation: "library", "triton".

    Returns:
        SplitExplanation: implementation, number of products, whether they are emulated, reasons.

    Raises:
        ValueError: as `split_linear`.
    """
    _check(x, weight, bias)
    chosen, kind = pick(IMPLS, impl, x, weight.hi), kind_of(weight.hi)
    lacking = devices.why_not_short_products(x.device, kind)
    exact = "is zero everywhere" if weight.lo is None else "is not zero"
    reasons = (
        f"the weight's second half {exact}: {weight.products} products of {kind} numbers",
        lacking or f"{x.device} multiplies {kind} numbers and sums in float32",
    )
    return SplitExplanation(chosen.name, weight.products, lacking is not None, reasons)


def _check(x: Tensor, weight: SplitWeight, bias: Tensor | None) -> None:
    hi, lo = weight
    if x.ndim != 2 or hi.ndim != 2 or x.shape[1] != hi.shape[1]:
        raise ValueError(
            f"expected (N, D) and a weight (V, D), got {tuple(x.shape)} and {tuple(hi.shape)}"
        )
    if x.dtype != torch.float32:
        raise ValueError(f"expected torch.float32, of which halves are made, got {x.dtype}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"expected contiguous rows, got strides {x.stride()}")
    if bias is not None and (bias.shape != hi.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"expected bias ({hi.shape[0]},) {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    check_one_device(x, hi, lo, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "expected no gradient to be needed, got one: call it under torch.no_grad()"
        )


torch.library.define(
    "sepo::split_linear", "(Tensor x, Tensor hi, Tensor? lo, Tensor? bias, str impl) -> Tensor"
)
_BY_NAME = {impl.name: impl for impl in IMPLS}


def _run(x: Tensor, hi: Tensor, lo: Tensor | None, bias: Tensor | None, impl: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would reach the products inside
        return _BY_NAME[impl].fwd(x, hi, lo, bias)


def _fake(x: Tensor, hi: Tensor, lo: Tensor | None, bias: Tensor | None, impl: str) -> Tensor:
    return x.new_empty((x.shape[0], hi.shape[0]))


torch.library.impl("sepo::split_linear", ("cpu", "cuda"), _run)
torch.library.register_fake("sepo::split_linear", _fake)
_fwd = torch.ops.sepo.split_linear.default
