"""The leg's stages: limits, deaths, and that neither takes anything else."""

import os
import sys
import time
from pathlib import Path

import pytest
from processes import python

from tools.leg.found import summary
from tools.leg.stages import Stage, run_stages

ROOT = Path(__file__).parents[2]


def stage(name: str, seconds: float, command, **options) -> Stage:
    return Stage(name, "tests", seconds, command, **options)


FINE, HANGS = python("print('here')"), python("import time; time.sleep(600)")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}


def statuses(*stages, **options) -> dict[str, str]:
    return {r.stage: r.status for r in run_stages(stages, **options)}


def test_a_failure_hides_nothing(capfd):
    stages = (
        stage("fine", 60, FINE),
        stage("fails", 60, python("raise SystemExit(3)")),
        stage("lacks", 60, ("/nowhere/program",)),
        stage("absent", 60, HANGS, absent="no such tool"),
        stage("last", 60, FINE),
    )
    seen = []
    results = run_stages(stages, done=seen.append)
    assert seen == results
    assert [r.status for r in results] == ["passed", "failed", "failed", "skipped", "passed"]
    text, code = summary(results, [])
    assert code == 1
    assert "exit status 3" in text and "no such tool" in text and "/nowhere/program" in text
    assert text.endswith("not well: fails, lacks; not measured: absent")
    assert capfd.readouterr().out.count("here") == 2


def test_a_stage_is_stopped_with_what_it_started(tmp_path):
    worker = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(600)"
    )
    results = run_stages(
        [stage("hangs", 2.0, python(code, str(worker)), again=3), stage("next", 60, FINE)]
    )
    assert [(r.status, r.reason) for r in results] == [("stopped", "after 2 s"), ("passed", "")]
    child = Path("/proc") / worker.read_text() / "stat"
    for _ in range(100):  # a killed process is there until somebody has waited for it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its stage")


def test_time_left_over_goes_to_the_next():
    assert statuses(stage("none", 0, FINE)) == {"none": "stopped"}
    given = statuses(stage("early", 60, FINE), stage("none", 0, FINE))
    assert given == {"early": "passed", "none": "passed"}
    assert statuses(stage("fine", 60, FINE), scale=0.0) == {"fine": "stopped"}


def test_stages_get_their_environment():
    code = "import os, sys; sys.exit(os.environ['SEPO_EXT'] != 'cuda-only')"
    env = os.environ | {"SEPO_EXT": "cuda-only"}
    assert statuses(stage("env", 60, python(code)), env=env) == {"env": "passed"}


DIES_IN_B = """
import os, sys
from bench import ledger
for what in "abc":
    if not ledger.died_in(what):
        ledger.at(what)
        open(sys.argv[1], "a").write(what)
        if what == "b":
            os.kill(os.getpid(), 9) if sys.argv[2] == "killed" else sys.exit(ledger.BROKEN)
"""


@pytest.mark.parametrize(("how", "said"), [("killed", "SIGKILL"), ("", "the device is broken")])
def test_a_process_that_dies_is_begun_again_without_what_killed_it(tmp_path, how, said):
    what = python(DIES_IN_B, str(tmp_path / "done"), how)
    (result,) = run_stages([stage("dies", 60, what, again=2)], env=ENVIRONMENT)
    assert (tmp_path / "done").read_text() == "abac"
    assert (result.status, result.reason) == ("failed", f"its process died in b ({said})")
    (result,) = run_stages([stage("dies", 60, python("import os; os.abort()"), again=1)])
    assert result.reason == "; ".join(["its process died in its start (SIGABRT)"] * 2)


KILLER = """
import os, sys, torch
from bench import report, run
from bench.harness import Job
from bench.operations.head import HeadCase
from bench.contender import Contender
from bench.contenders import ours, plain
(right,) = (p for p in plain.HEAD if p.name == "dense")
providers = [*ours.HEAD[:1], Contender("killer", lambda inputs: os.abort()), right]
case = HeadCase("case", 0.5, torch.float32, N=32, response=24, D=8, V=40)
job = Job(case, providers, device="cpu", rounds=2)
rows, code = run.run([job])
print({row["provider"]: (row["status"], row["reason"]) for row in rows})
sys.exit(code)
"""


def test_a_rival_that_kills_the_process_leaves_the_others_their_time(capfd):
    (result,) = run_stages([stage("case", 500, python(KILLER), again=1)], env=ENVIRONMENT)
    assert result.reason == "its process died in case: killer (SIGABRT)"
    said = capfd.readouterr().out.splitlines()[-1]
    assert "'sepo': ('measured', '')" in said and "'dense': ('measured', '')" in said
    assert "'killer': ('refused', 'the process died in it')" in said


TESTS = """
import os, pytest, torch
broken = []
def wait():
    if broken: raise RuntimeError("CUDA error: an illegal memory access was encountered")
if os.environ["HOW"] == "broken":
    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, wait
    torch.cuda.empty_cache = lambda: None
def test_first(): pass
def test_fails(): assert not "an ordinary failure"
def test_kills():
    if os.environ["HOW"] == "killed": os.abort()
    broken.append(1)
    assert not "its own failure"
@pytest.mark.parametrize("impl", ["flex", "varlen"])
def test_last(impl): pass
"""


@pytest.mark.parametrize("how", ["killed", "broken"])
def test_a_test_that_kills_the_process_leaves_the_others_to_run(tmp_path, how, capfd):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
    (tmp_path / "test_them.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    pytest_there = (sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider")
    command = (*pytest_there, "--rootdir", str(tmp_path), "-k", "not flex", str(tmp_path))
    (result,) = run_stages([stage("them", 500, command, again=2)], env=ENVIRONMENT | {"HOW": how})
    assert result.status == "failed" and "died in test_them.py::test_kills" in result.reason
    said = capfd.readouterr().out
    assert said.count("test_first PASSED") == said.count("test_last[varlen] PASSED") == 1
    assert "test_last[flex]" not in said
    if how == "broken":
        assert "the device is broken since test_them.py::test_kills" in said
        assert "its own failure" in said and "an ordinary failure" in said
