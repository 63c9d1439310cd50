"""This project's own operations over time: `make bench-ops`. Contests with others are run.py's.

pytest-benchmark saves a run, compares it with a saved one and draws both. Its calls come one case after
the other, so a busy minute is one case's alone: that is why rivals take turns elsewhere.
"""

import pytest
import torch

from bench import jobs
from bench.harness import Job, device_here

ROUNDS = 5
DEVICE = device_here()
SUITES = [suite for suite in jobs.SUITES if suite != "step" and not jobs.lacking(suite)]
OURS = [
    pytest.param(job.case, contender, id=job.name)  # by impl="auto"
    for job in jobs.jobs(tuple(SUITES), device=DEVICE, providers=("sepo",))
    for contender in job.contenders
    if contender.name == "sepo"
]


@pytest.mark.parametrize("case, contender", OURS)
def test_ours(case, contender, benchmark):
    """Forward and backward of a case of bench/run.py, if it passes the gate there."""
    (row,) = Job(case, [contender], device=DEVICE).gate()
    if row.status == "skipped":
        pytest.skip(row.reason)
    assert row.status == "passed", row.reason
    run = case.inputs(DEVICE).call(contender)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    benchmark.group = case.name
    benchmark.extra_info |= {"note": row.note, "errors": row.errors, "shape": row.shape}
    benchmark.pedantic(lambda: (run(), wait()), rounds=ROUNDS, warmup_rounds=1)
