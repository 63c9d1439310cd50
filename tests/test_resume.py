"""A run killed at any moment and resumed ends with the weights of the uninterrupted one."""

import json
import random
import time

import pytest
from processes import run, start
from training_run import make_run

pytestmark = pytest.mark.slow
TRAIN = ("-m", "sepo.train")


def wait_for_steps(process, metrics, steps):
    """Until so many lines are logged; the process must not end by itself before."""
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_killed_and_resumed_is_bit_equal(tmp_path):
    arguments = make_run(tmp_path, pairs=40, num_train_epochs=2, save_total_limit=3)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(*TRAIN, *arguments, "--output_dir", whole)
    resume = (*TRAIN, *arguments, "--output_dir", torn, "--resume_from_checkpoint", "true")
    rng = random.Random(0)
    for steps in (1, 5, 11):
        process = start(*resume)
        wait_for_steps(process, torn / "metrics.jsonl", steps)
        time.sleep(rng.uniform(0, 0.05))  # somewhere in a step, a checkpoint or a rotation
        process.kill()
        process.communicate()
    run(*resume)
    assert (whole / "model.safetensors").read_bytes() == (torn / "model.safetensors").read_bytes()
    logs = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (whole, torn)
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert [line.get("loss") for line in logs[0]] == [line.get("loss") for line in logs[1]]
