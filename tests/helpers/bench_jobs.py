"""A job of bench/ from its gate to its rows, as bench.run takes it when the gate is green."""

import pytest
import torch

# with older ones torch's counter knows no grouped heads, and transformers multiplies for the rotation
COUNTED = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="needs torch 2.13's counter"
)


def finished(job) -> list:
    job.gate()
    job.ready()
    for _ in range(job.rounds):
        job.turn()
    return job.finish()
