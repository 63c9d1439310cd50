"""A job of bench/ from its gate to its rows, as bench.run takes it when the gate is green."""

from types import SimpleNamespace

import pytest
import torch

from bench.harness import Job

# with older ones torch's counter knows no grouped heads, and transformers multiplies for the rotation
COUNTED = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="needs torch 2.13's counter"
)


def finished(job: Job) -> list:
    job.gate()
    job.ready()
    for _ in range(job.rounds):
        job.turn()
    return job.finish()


def stepping(contenders, weights, rounds: list[list], truth, dtype=torch.bfloat16) -> Job:
    """A job of a whole step of contenders that a test has made; round 0 is the gate's."""
    from bench.steps.inputs import Steps

    inputs = Steps(contenders, weights, rounds, truth, dtype)
    case = SimpleNamespace(name="", suite="step", legend="", kept=True, dtype=dtype, shape={})
    case.inputs = lambda device: inputs
    return Job(case, device="cpu", rounds=len(rounds) - 1)
