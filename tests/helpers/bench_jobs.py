"""A job of bench/ from its gate to its rows, as bench.run takes it when the gate is green."""

from types import SimpleNamespace

import pytest
import torch

from bench import plain
from bench.contender import gradients
from bench.harness import Job

# with older ones torch's counter knows no grouped heads, and transformers multiplies for the rotation
COUNTED = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="needs torch 2.13's counter"
)
TINY = dict(N=64, response=48, D=16, V=101, segments=4)
ATTENTION = dict(pairs=3, max_length=40, heads=4, groups=2, width=32)


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


def logprob(inputs, spoil=lambda found: found):
    hidden, weight = inputs.leaves()
    logp = plain.selected_logprob(hidden, weight, inputs.rows, inputs.targets, gather_first=True)
    found = {"logp": logp.detach(), **gradients(logp, inputs.upstream, hidden, weight)}
    return spoil(found)
