"""Tell the user of bfloat16 on a machine that is slow at it."""

import logging

import torch

from sepo_kernels.devices import bfloat16_speed


def warn_if_slow(
    flag: str,  # as it was given
    device: torch.device | str,
    mend: str = "leave it out",
) -> None:
    """One line of warning where `flag` asks for bfloat16 of a CPU that multiplies float32 faster."""
    if torch.device(device).type == "cpu" and bfloat16_speed("cpu") < 1:
        logging.getLogger(__name__).warning(
            f"{flag}: expected a CPU that multiplies bfloat16 as fast as float32, got one that "
            f"takes {times_as_long()} times as long; {mend}"
        )


def times_as_long() -> str:
    """Of a bfloat16 product on this CPU, in units of the same in float32."""
    ratio = 1 / bfloat16_speed("cpu")
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.0f}"
