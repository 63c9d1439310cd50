"""What the GPU leg does and says, rehearsed with fake answers: nothing here needs a GPU."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import python

from bench import jobs, ledger, report, run
from tools import gpu
from tools.leg import order, watched, wheels
from tools.leg import trace as tracing
from tools.leg.found import summary
from tools.leg.stages import Result, run_stages

ROOT = Path(__file__).parents[2]


def test_the_leg_measures_everything_in_order(monkeypatch):
    monkeypatch.setattr(order, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    stages = order.stages(Path("results.jsonl"))
    assert list(dict.fromkeys(s.group for s in stages)) == list(order.GROUPS)
    assert not any(s.absent for s in stages) and len({s.name for s in stages}) == len(stages)
    assert 15 * 60 < sum(s.seconds for s in stages) < 30 * 60
    words = [word for s in stages for word in s.command]
    files = [w for w in words if w.endswith(".py")]
    assert len(files) > 30 and all((ROOT / w).exists() for w in files)
    # every operation's case is a process, once; the large ones come first in each group
    names = [
        x.name
        for x in jobs.jobs(("head", "select", "attention", "score"), device="cuda", cases=("*",))
    ]
    groups = "head", "kl", "select", "attention", "score"
    found = [s.name for s in stages if s.group in groups]
    assert sorted(found) == sorted(names)
    first = {group: next(s.name for s in stages if s.group == group) for group in ("head", "kl")}
    assert all("large" in name for name in first.values())
    for s in stages:
        if s.name in names:
            args = run.parser().parse_args(s.command[2:])
            assert args.case == [s.name] and args.device == "cuda" and str(args.figure) == "none"
    steps = [s for s in stages if s.group == "step"]
    assert [s.name for s in steps] == [*order.STEPS, "trace"]
    # every GPU test is in one process, flex in one of its own
    tests = [s for s in stages if s.group == "tests"]
    gpu_files = {f"tests/gpu/{s.name}.py" for s in tests[:-1]}
    marked = re.compile(r"^(pytestmark = |@).*mark\.gpu\b", re.M)
    assert gpu_files == {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/gpu/test_*.py")
        if marked.search(path.read_text())
    }
    assert tests[-1].name == "flex" and gpu_files <= {*tests[-1].command}
    assert all("-v" in s.command and s.again for s in tests)
    only = order.stages(Path("results.jsonl"), ("kl", "build"))
    assert {s.group for s in only} == {"environment", "build", "kl"}


def test_the_sanitizer_watches_our_kernels_alone(monkeypatch):
    monkeypatch.setattr(order, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    watches = [s.command for s in order.stages(Path("-"), ("sanitizer",))[2:]]
    kernels = set()
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        kernels |= set(re.findall(r"__global__.*?(\w+)\($", source.read_text(), re.M))
    assert len(kernels) == 3
    for command in watches:
        kept = [b.removeprefix("kns=") for a, b in zip(command, command[1:], strict=False)
                if a == "--kernel-name"]  # fmt: skip
        assert all(any(part in kernel for part in kept) for kernel in kernels)
    monkeypatch.setattr(order, "find_sanitizer", lambda: None)
    absent = {s.name: s.absent for s in order.stages(Path("-"), ("sanitizer",))[2:]}
    reason = "compute-sanitizer is not on this machine"
    assert absent == {"memcheck": reason, "racecheck": reason}


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", 9, 1),
        ("Traceback\n========= ERROR SUMMARY: 0 errors", 1, 1),  # the program's own failure
        ("========= RACECHECK SUMMARY: 0 hazards displayed", 0, 0),
        ("========= Error: Device not supported", 255, ledger.REFUSED),
        ("calls are right", 0, ledger.REFUSED),  # it ran, and nothing was watched
    ],
)
def test_a_sanitizer_that_refuses_is_no_failure(tmp_path, monkeypatch, said, code, expected):
    tool, path = tmp_path / "compute-sanitizer", tmp_path / "ledger"
    tool.write_text(f"#!/bin/sh\ncat <<'.'\n{said}\n.\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv(ledger.VARIABLE, str(path))
    assert watched.main([str(tool), "--tool", "memcheck", "program"]) == expected
    if expected == ledger.REFUSED:
        last = said.splitlines()[-1].strip("= ")
        assert path.read_text() == f"compute-sanitizer refuses: {last}\n"


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


FAKE = """
import json, os, sys, time
from pathlib import Path
name, path, answer = sys.argv[1:]
row = dict(case=name, provider="sepo", status="measured", reason="", ours=True)
def keep(**more):
    with open(path, "a") as file: file.write(json.dumps(row | more) + "\\n")
keep()
keep(provider="cce", status="measured", ours=False)
keep(provider="quack", status="skipped", reason="needs compute capability 9.0", ours=False)
if answer == "bare": keep(provider="trl", status="skipped", reason="trl is not installed", ours=False)
if answer == "broken":
    keep(provider="trl_divergence", status="refused", reason="ImportError: no pandas", ours=False)
if answer == "memory": keep(provider="dense", status="refused", reason="out of memory", ours=False)
if answer == "refuses":
    Path(os.environ["SEPO_LEG_LEDGER"]).write_text("compute-sanitizer refuses: no\\n"); sys.exit(75)
if answer == "fails": sys.exit(1)
if answer == "dies": os.abort()
if answer == "hangs": time.sleep(600)
"""


@pytest.mark.parametrize(
    ("answers", "code", "last"),
    [
        ({}, 0, "all is well"),
        ({"kl-ref-policy": "memory"}, 0, "all is well"),
        ({"head-large-30": "bare"}, 3, "not measured: trl (a rival, not installed)"),
        ({"kl-ref-policy": "broken"}, 3, "not measured: trl_divergence (ImportError: no pandas)"),
        ({"racecheck": "refuses"}, 3, "not measured: racecheck"),
        ({"step llama-1b": "hangs"}, 3, "not measured: step llama-1b"),
        ({"head-large-30": "dies"}, 1, "not well: head-large-30"),
        ({"flex": "fails", "memcheck": "refuses"}, 1, "not well: flex; not measured: memcheck"),
    ],
)
def test_the_leg_rehearsed(device, monkeypatch, tmp_path, capsys, answers, code, last):
    """Its own stages with fake answers: the last line names what they did not measure."""
    path, real = tmp_path / "new" / "found.jsonl", order.stages
    (tmp_path / "new").mkdir()

    def fake(*asked):
        monkeypatch.setattr(order, "find_sanitizer", lambda: "/opt/compute-sanitizer")
        found = []
        for s in real(*asked):
            answer = answers.get(s.name, "")
            # without an interpreter where there is nothing to be said: there are forty stages
            command = python(FAKE, s.name, str(path), answer) if answer else ("true",)
            found.append(
                replace(s, command=command, again=0, seconds=6 if answer == "hangs" else 30)
            )
        return tuple(found)

    monkeypatch.setattr(order, "stages", fake)
    monkeypatch.setattr(gpu, "said", lambda *command: "1.0")
    hangs = "hangs" in answers.values()
    only = ["--only", "step"] if hangs else []
    minutes = "0.2" if hangs else "30"
    assert gpu.main(["--json", str(path), "--minutes", minutes, *only]) == code
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == last or (hangs and said.startswith(last))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    done = [line["stage"] for line in lines if "stage" in line]
    assert done == [s.name for s in real(path, ("step",) if hangs else ())]
    for line in (line for line in lines if "stage" in line):
        assert line["machine"] == "NVIDIA Test 1" and line["memory"] == "128 GiB"
        assert line["torch"] == torch.__version__ and line["commit"] and line["seconds"] >= 0


def test_a_leg_without_steps_is_not_well(device, monkeypatch):
    """As on the first machine: what a suite needs was missing, and all was said to be well."""
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    stages = order.stages(Path("results.jsonl"), ("attention", "score", "step"))[2:]
    assert {s.absent for s in stages} == {"transformers, accelerate not installed"}
    results = run_stages(stages)
    text, code = summary(results, [])
    assert code == 3
    expected = ", ".join(["attention", "score", *order.STEPS, "trace"])
    assert text.splitlines()[-1] == f"not measured: {expected}"


def test_what_was_not_asked_for_is_named(device):
    results = [Result("head-large-30", "passed", 1.0, "")]
    text, code = summary(results, [], left_out=["step", "tests"])
    assert (text.splitlines()[-1], code) == (
        "all that was asked for is well; not asked for: step, tests", 0,
    )  # fmt: skip


def test_where_stages_run(device):
    found = gpu.environment()
    assert found["TORCH_CUDA_ARCH_LIST"] == "9.0" and found["SEPO_EXT"] == "cuda-only"
    assert found["PYTHONPATH"].split(os.pathsep)[-1] == str(wheels.SITE)
    assert report.default_path("cuda").name == "nvidia-test-1.jsonl"


def write_wheel(folder: Path, name: str, *needs: str) -> None:
    about = f"{name}-9.1.dist-info"
    lines = "Metadata-Version: 2.1", f"Name: {name}", "Version: 9.1"
    with zipfile.ZipFile(folder / f"{name}-9.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        needed = [f"Requires-Dist: {need}" for need in needs]
        wheel.writestr(f"{about}/METADATA", "\n".join((*lines, *needed)))
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{about}/RECORD", "")


def test_carried_wheels_are_installed_where_they_lack(tmp_path, capfd):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    for name in ("sepo_carried", "torch"):  # of which one is here
        write_wheel(folder, name)
    assert wheels.install(folder, site) == 0
    assert (site / "sepo_carried.py").exists() and not (site / "torch.py").exists()
    assert "lacking: sepo-carried" in capfd.readouterr().out
    assert wheels.install(tmp_path / "none", site) == 0


def test_carried_wheels_that_clash_with_what_is_there_are_left_out(tmp_path, capfd):
    """As pandas 3 does with numpy 2.0: datasets would be found, and could not be imported."""
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    write_wheel(folder, "sepo_newer", "torch>=99", 'numpy>=99; extra == "more"')
    write_wheel(folder, "sepo_of_newer", "sepo-newer")
    write_wheel(folder, "sepo_fine", "torch>=2", "sepo-absent>=3", 'numpy>=99; extra == "more"')
    assert wheels.install(folder, site) == 0
    assert [file.name for file in site.glob("*.py")] == ["sepo_fine.py"]
    said = capfd.readouterr().out
    assert "sepo-newer is left out: it needs torch >=99, got 2." in said
    assert "sepo-of-newer is left out: it needs sepo-newer" in said and said.count("left out") == 2


def test_a_trace_in_words():
    ms = 1_000_000
    events = [
        ("Memcpy HtoD (Pageable -> Device)", 0, ms),
        ("nvjet_tst_128x256", ms, 7 * ms),
        ("void at::native::vectorized_elementwise_kernel<4>", 9 * ms, ms),  # after a gap
    ]
    said = "\n".join(tracing.digest(reversed(events)))
    assert "10.00 ms from the first" in said
    assert re.search(r"1\.00 ms +10\.0% +1 copies from pageable memory", said)
    assert re.search(r"7\.00 ms +70\.0% +1 matrix products", said)
    assert re.search(r"1\.00 ms +10\.0% +1 elementwise", said)
    assert re.search(r"1\.00 ms +10\.0% +1 gaps over 50 µs", said)
    assert tracing.digest([]) == ["the device did nothing"]


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
            self.rows = [Row("head", "case", f"sepo:{s}", s, ours=True) for s in gated]
            self.rows.append(Row("head", "case", "peer", "refused"))

        def finish(self):
            self.rows = [Row("head", "case", f"sepo:{s}", s, ours=True) for s in statuses]
            self.rows.append(Row("head", "case", "peer", "measured"))

        def records(self):
            return [row.record() for row in self.rows]

    monkeypatch.setattr(jobs, "jobs", lambda *suites, **options: [Job()] if statuses else [])
    monkeypatch.setattr(report, "machine", lambda device: Device.name)
    arguments = ["--suite", "head", "--json", str(tmp_path / "rows.jsonl"), "--figure", "none"]
    assert run.main(arguments) == code


def test_without_a_device_it_says_so_at_once():
    done = subprocess.run(
        [sys.executable, "tools/gpu.py"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == "no CUDA device: nothing was measured\n"
