import re

import pytest
import torch

from sepo.demo import DATA, estimate, run
from sepo_kernels import devices

COUNTS = {
    "run": 1, "pairs": 412, "oracle pairs": 160, "held-out pairs": 71, "all pairs": 483,
    "openings": 96, "samples": 384,
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many TFLOP/s in both dtypes."""

    def pretend(float32: float, bfloat16: float, threads: int = 2):
        rate = {torch.float32: float32, torch.bfloat16: bfloat16}
        monkeypatch.setattr(estimate, "tflops", rate.__getitem__)
        monkeypatch.setattr(devices, "_gemm_seconds", lambda a: 1 / rate[a.dtype])
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        devices.bfloat16_speed.cache_clear()

    yield pretend
    devices.bfloat16_speed.cache_clear()


def minutes(line: str) -> int:
    return int(re.match(r"about (\d+) minutes? on this machine", line)[1])


def test_the_line_says_what_it_rests_on(machine):
    machine(0.2, 0.8, threads=2)
    line = estimate.estimate(COUNTS)
    assert "(2 cores, 0.20 TFLOP/s in float32, bfloat16 at 4 times that)" in line
    seconds = dict(re.findall(r"(\w+) (\d+)(?:,|$)", line.split("seconds: ")[1]))
    assert list(seconds) == list(estimate.STAGES)
    assert minutes(line) == pytest.approx(sum(map(int, seconds.values())) / 60, abs=0.6)
    machine(0.2, 0.002)
    assert "bfloat16 at 0.01 times that" in estimate.estimate(COUNTS)


def test_a_faster_machine_and_less_to_do_take_less(machine):
    found = []
    for rates in ((0.1, 0.001), (0.2, 0.002), (0.2, 0.8), (0.2, 0.8, 8)):
        machine(*rates)
        found.append(minutes(estimate.estimate(COUNTS)))
    assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1]
    machine(0.1, 0.001)
    assert minutes(estimate.estimate(COUNTS | {"samples": 96})) < found[0]


def test_a_product_is_measured():
    assert 1e-4 < estimate.tflops(torch.float32) < 1e3


def test_the_stages_are_the_demos(monkeypatch):
    """All that the demo counts, and nothing else, is what the stages are for."""
    asked = {what for parts in estimate.STAGES.values() for what in parts}
    seen = {}
    monkeypatch.setattr(run, "estimate", lambda counts: seen.update(counts) or "")
    lines = {name: len(run.read_lines(DATA / f"{name}.jsonl")) for name in ("pairs", "heldout")}
    openings = len(run.read_lines(DATA / "heldout_openings.txt"))
    run.how_long(oracle_pairs=160, samples=4 * openings, openings=openings, **lines)
    assert seen == COUNTS and set(seen) == asked
