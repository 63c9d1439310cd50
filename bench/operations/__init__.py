"""One file an operation: its cases, their inputs, and the float64 truth they are gated on."""

import torch


def seeded(device: str) -> torch.Generator | None:
    """Draws the same every time; on "meta", where shapes alone are asked for, there is none."""
    return None if device == "meta" else torch.Generator(device).manual_seed(0)
