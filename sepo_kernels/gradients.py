"""A head's gradients, summed over parts of the rows from columns of dZ, that of its logits."""

from collections.abc import Iterable

from torch import Tensor

from sepo_kernels.devices import accumulator
from sepo_kernels.gemm import add_gemm, add_rows, add_targets, gemm
from sepo_kernels.scales import Scale, below_largest, largest


class HeadGradients:
    """The sums so far. dZ comes times the scale: X in dW would be rounded once more with it."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        scale: Scale,  # a number, or (M,)
        need: tuple[bool, bool, bool],  # of hidden, weight and bias
        num_parts: int,
    ) -> None:
        acc = accumulator(hidden.dtype)
        self.need_hidden, self.need_weight, self.need_bias = need
        self.dtype, self.scale, self.weight, self.is_empty = hidden.dtype, scale, weight, True
        self.grad_hidden = hidden.new_zeros(hidden.shape if self.need_hidden else (0,), dtype=acc)
        # one part of rows writes dW once, in the weight's dtype; more are summed in float32
        self.grad_weight = weight.new_empty(
            weight.shape if self.need_weight else (0,), dtype=acc if num_parts > 1 else self.dtype
        )
        self.grad_bias = weight.new_zeros(weight.shape[:1] if self.need_bias else (0,), dtype=acc)

    def add(
        self,
        part: slice,  # of the M rows
        rows: Tensor,  # (chunk,) int32
        x: Tensor,  # (chunk, D)
        columns: Iterable[tuple[slice, Tensor]],  # all of V, with dZ there, (chunk, columns)
        targets: Tensor,  # (chunk,)
        at_target: Tensor | None,  # (chunk, 1), where the columns have zero
    ) -> None:
        """Add the gradients of some rows."""
        grad_x = x.new_zeros(x.shape if self.need_hidden else (0,), dtype=self.grad_hidden.dtype)
        to_bias = below_largest(self.scale, part, x)  # (chunk, 1): db has no scale
        narrow = to_bias.to(self.dtype)
        for c, dz in columns:
            if self.need_hidden:
                add_gemm(grad_x, dz, self.weight[c])
            if self.need_weight and self.is_empty:
                gemm(dz.T, x, out=self.grad_weight[c])
            elif self.need_weight:
                add_gemm(self.grad_weight[c], dz.T, x)
            if self.need_bias:
                self.grad_bias[c] += gemm(dz.T, narrow)[:, 0]
        self.is_empty = False
        if at_target is not None:
            if self.need_hidden:
                grad_x += self.weight.index_select(0, targets) * at_target
            if self.need_weight:
                add_targets(self.grad_weight, targets, x * at_target)
            if self.need_bias:
                self.grad_bias.index_add_(0, targets, (at_target * to_bias)[:, 0])
        if self.need_hidden:
            add_rows(self.grad_hidden, rows, grad_x)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (N, D), (V, D) and (V,) in the inputs' dtype; (0,) for what is not needed."""
        if self.is_empty:
            self.grad_weight.zero_()
        bias = self.grad_bias / largest(self.scale)
        return self.grad_hidden.to(self.dtype), self.grad_weight.to(self.dtype), bias.to(self.dtype)
