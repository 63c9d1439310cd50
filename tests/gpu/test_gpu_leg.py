"""The GPU leg's machinery, with stages that need no GPU: limits, failures, the summary."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, jobs, report
from bench.gpu import Stage

ROOT = Path(__file__).parents[2]


def python(code: str, *args) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *args)


FINE, HANGS = python("print('here')"), python("import time; time.sleep(600)")


def statuses(*stages, **options) -> dict[str, str]:
    return {r.stage: r.status for r in gpu.run_stages(stages, **options)}


def test_a_failure_hides_nothing(capfd):
    stages = (
        Stage("fine", 60, (FINE,)),
        Stage("fails", 60, (python("raise SystemExit(3)"), python("print('never')"))),
        Stage("lacks", 60, (("/nowhere/program",),)),
        Stage("absent", 60, (HANGS,), absent="no such tool"),
        Stage("last", 60, (FINE,)),
    )
    seen = []
    results = gpu.run_stages(stages, done=seen.append)
    assert seen == results
    assert [r.status for r in results] == ["passed", "failed", "failed", "skipped", "passed"]
    assert [r.ok for r in results] == [True, False, False, True, True]
    text = gpu.summary(results)
    assert "exit status 3" in text and "no such tool" in text and "/nowhere/program" in text
    assert text.endswith("not well: fails, lacks")
    printed = capfd.readouterr().out
    assert printed.count("here") == 2 and "never" not in printed


def test_a_stage_is_stopped_with_what_it_started(tmp_path):
    worker = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(600)"
    )
    stages = Stage("hangs", 2.0, (python(code, str(worker)),)), Stage("next", 60, (FINE,))
    results = gpu.run_stages(stages)
    assert [r.status for r in results] == ["stopped", "passed"]
    assert [r.ok for r in results] == [False, True] and results[0].reason == "after 2 s"
    child = Path("/proc") / worker.read_text() / "stat"
    for _ in range(100):  # a killed process is there until somebody has waited for it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its stage")


def test_time_left_over_goes_to_the_next():
    assert statuses(Stage("none", 0, (FINE,))) == {"none": "stopped"}
    given = statuses(Stage("early", 60, (FINE,)), Stage("none", 0, (FINE,)))
    assert given == {"early": "passed", "none": "passed"}
    assert statuses(Stage("fine", 60, (FINE,)), scale=0.0) == {"fine": "stopped"}


def test_what_may_run_out_of_time_is_no_failure():
    (result,) = gpu.run_stages([Stage("extra", 0.2, (HANGS,), may_run_out=True)])
    assert result.status == "stopped" and result.ok


def test_stages_get_their_environment():
    code = "import os, sys; sys.exit(os.environ['SEPO_EXT'] != 'cuda')"
    env = os.environ | {"SEPO_EXT": "cuda"}
    assert statuses(Stage("env", 60, (python(code),)), env=env) == {"env": "passed"}


def test_the_leg_is_what_it_says(monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    stages = gpu.stages(Path("results.jsonl"))
    names = "environment build tests memcheck racecheck waits benchmark end to end"
    assert " ".join(s.name for s in stages) == names
    assert sum(s.seconds for s in stages) == 8 * 60
    assert not any(s.absent for s in stages)
    words = [word.removeprefix("--ignore=") for s in stages for c in s.commands for word in c]
    files = [w for w in words if w.endswith(".py") or w.startswith("tests/")]
    assert len(files) > 5 and all((ROOT / w).exists() for w in files)

    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    absent = {s.name: s.absent for s in gpu.stages(Path("results.jsonl")) if s.absent}
    reason = "compute-sanitizer is not on this machine"
    assert absent == {"memcheck": reason, "racecheck": reason}
    assert statuses(*[s for s in stages if s.name in absent], scale=0.0) == {
        "memcheck": "stopped", "racecheck": "stopped",
    }  # fmt: skip


class Device:
    """As much of a GPU as the leg asks about."""

    name, major, minor, total_memory = "NVIDIA Test 1", 9, 0, 2**37


@pytest.fixture
def device(monkeypatch):
    for name, answer in (
        ("is_available", True),
        ("get_device_name", Device.name),
        ("get_device_capability", (9, 0)),
        ("get_device_properties", Device),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


@pytest.mark.parametrize(("second", "code"), [(FINE, 0), (python("raise SystemExit(1)"), 1)])
def test_results_and_exit_status(device, monkeypatch, tmp_path, capsys, second, code):
    stages = Stage("one", 30, (FINE,)), Stage("two", 30, (second,))
    monkeypatch.setattr(gpu, "stages", lambda path: stages)
    path = tmp_path / "new" / "found.jsonl"
    assert gpu.main(["--json", str(path), "--minutes", "2"]) == code
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["one", "two"]
    for line in lines:
        assert line["machine"] == "NVIDIA Test 1" and line["memory"] == "128 GiB"
        assert line["torch"] == torch.__version__ and line["commit"] and line["seconds"] >= 0
    assert ("all is well" if code == 0 else "not well: two") in capsys.readouterr().out
    assert gpu.environment()["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert report.default_path("cuda").name == "nvidia-test-1.jsonl"


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["measured", "skipped"], 0),
        (["measured", "refused"], 1),  # a wrong result has no speed, and is a failure
        (["skipped"], 1),
        ([], 1),
    ],
)
def test_benchmark_fails_if_ours_is_wrong_or_missing(monkeypatch, tmp_path, statuses, code):
    from bench.harness import Row

    class Job:
        name, suite, rounds, about, legend = "case", "head", 1, {}, ""
        ready = turn = text = lambda self: ""

        def gate(self):
            gated = [s.replace("measured", "passed") for s in statuses]
            rows = [Row("head", "case", f"sepo:{s}", "", s, ours=True) for s in gated]
            return [*rows, Row("head", "case", "peer", "", "refused", ours=False)]

        def finish(self):
            rows = [Row("head", "case", f"sepo:{s}", "", s, ours=True) for s in statuses]
            return [*rows, Row("head", "case", "peer", "", "measured", ours=False)]

    monkeypatch.setattr(jobs, "jobs", lambda *suites, **options: [Job()] if statuses else [])
    monkeypatch.setattr(report, "machine", lambda device: Device.name)
    assert gpu.benchmark(tmp_path / "rows.jsonl") == code


def test_a_machine_without_a_trainer_has_no_race(monkeypatch):
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    last = gpu.stages(Path("results.jsonl"))[-1]
    assert last.name == "end to end"
    assert last.absent == "transformers, accelerate, datasets not installed"


def test_without_a_device_it_says_so_at_once():
    done = subprocess.run(
        [sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == "no CUDA device: nothing was measured\n"
