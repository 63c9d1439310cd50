"""The scale of a head's logits: one number, or one a row where each sample has a temperature.

The kernels read either in the same place, so equal numbers a row give the bits of the one number.
"""

from torch import Tensor

from sepo_kernels.devices import accumulator

Scale = float | Tensor  # of all rows, or (M,) in the accumulator's dtype


def of_part(scale: Scale, part: slice) -> Scale:
    """Return the scale of the rows `part`."""
    return scale[part] if isinstance(scale, Tensor) else scale


def as_column(scale: Scale) -> Scale:
    """Return what multiplies a (M, columns) block: the number, or (M, 1)."""
    return scale[:, None] if isinstance(scale, Tensor) else scale


def scale_arguments(scale: Scale) -> tuple[float, Tensor | None]:
    """Return what operators and kernels take: a number, and (M,) that stand in for it, or None."""
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


def largest(scale: Scale) -> Scale:
    """Return the largest scale of any row, a number or a tensor of one."""
    if isinstance(scale, Tensor):
        return scale.amax() if len(scale) else 1.0
    return scale


def below_largest(scale: Scale, part: slice, like: Tensor) -> Tensor:
    """Return largest(scale) / scale of the rows `part`, (chunk, 1): ones if all rows are alike."""
    ones = like.new_ones((like.shape[0], 1), dtype=accumulator(like.dtype))
    return ones * (largest(scale) / scale[part, None]) if isinstance(scale, Tensor) else ones
