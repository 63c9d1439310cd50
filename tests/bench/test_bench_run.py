"""bench/run.py: a red gate has no speed, a run leaves its rows, the same case at another commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_jobs import TINY, logprob

from bench import base, jobs, run
from bench.contender import Contender
from bench.harness import Job
from bench.operations import head
from sepo.commands import main as cli
from sepo.cost import tables
from sepo.errors import InputError

ROOT = Path(__file__).parents[2]


def job(name: str, *providers: Contender) -> Job:
    return Job(head.HeadCase(name, 0.5, torch.float32, **TINY), providers, device="cpu", rounds=3)


def spoilt(inputs):
    return logprob(inputs, lambda found: found | {"logp": found["logp"] + 0.01})


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where main leaves rows and figure of the jobs that a test hands it."""
    path = tmp_path / "rows.jsonl"
    arguments = ["--json", str(path), "--figure", str(tmp_path / "figure.svg"), "--device", "cpu"]

    def main(*found, more=()):
        monkeypatch.setattr(jobs, "jobs", lambda *suites, **options: list(found))
        code = run.main([*arguments, *more])
        return code, [json.loads(line) for line in path.read_text().splitlines()]

    return main


def test_nothing_is_timed_on_a_red_gate(results, monkeypatch, capsys, tmp_path):
    """One of ours wrong in one case: no other case, nor a peer, gets a speed."""
    monkeypatch.setattr(Job, "ready", lambda self: pytest.fail("something was to be timed"))
    green = job("green", Contender("sepo", logprob, ours=True), Contender("peer", logprob))
    red = job("red", Contender("sepo", spoilt, ours=True), Contender("peer", logprob))
    code, rows = results(green, red)
    assert code == 1
    assert [row["status"] for row in rows] == ["passed", "passed", "refused", "passed"]
    assert not any(row["seconds"] or row["median"] for row in rows)
    said = capsys.readouterr().out
    assert "the gate is red" in said and "sepo is refused: logp is off by" in said
    assert not (tmp_path / "figure.svg").exists()


def test_a_run(results, capsys, tmp_path):
    """A wrong peer keeps nobody from a speed; rows carry what a reader needs to judge them."""
    peers = (
        Contender("peer", logprob, lambda inputs: "peer is not installed"),
        Contender("bad", spoilt),
    )
    code, rows = results(job("one", Contender("sepo", logprob, ours=True), *peers))
    assert code == 0
    assert [row["status"] for row in rows] == ["measured", "skipped", "refused"]
    (row, *_) = rows
    assert len(row["seconds"]) == 3 and row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    assert row["flop"] > 0 and row["bytes"] > 0 and row["roof_flop_rate"] > 0
    assert row["roof"] == pytest.approx(
        max(row["flop"] / row["roof_flop_rate"], row["bytes"] / row["roof_byte_rate"])
        / row["median"]
    )
    for key in ("date", "machine", "threads", "command", "versions", "commit"):
        assert row[key]
    said = capsys.readouterr().out
    assert "peer is not installed" in said and "GFLOP/s in a float32 product of 32³" in said
    picture = (tmp_path / "figure.svg").read_text()
    assert (
        ">one, ms</text>" in picture and ">sepo</text>" in picture and ">bad</text>" not in picture
    )


def test_without_ours_a_run_has_failed(results):
    missing = Contender("sepo", logprob, lambda inputs: "not here", ours=True)
    assert results(job("one", missing, Contender("peer", logprob)))[0] == 1
    assert results(job("one", Contender("peer", logprob)))[0] == 0  # as asked


def test_rows_on_the_standard_output(results, monkeypatch, capsys):
    found = job("one", Contender("sepo", logprob, ours=True))
    monkeypatch.setattr(jobs, "jobs", lambda *suites, **options: [found])
    assert run.main(["--json", "-", "--figure", os.devnull + ".svg"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["provider"] for line in said.out.splitlines()] == ["sepo"]
    assert "gate one: 1 of 1 pass" in said.err


def test_after_the_deadline_the_least_rounds_alone():
    """No case is left out, however late it begins."""
    found = [job(n, Contender("sepo", logprob, ours=True)) for n in ("first", "second")]
    rows, code = run.run(found, tell=lambda text: None, deadline=-1.0)
    assert code == 0 and [row["case"] for row in rows] == ["first", "second"]
    assert all(len(row["seconds"]) == run.LEAST_ROUNDS < found[0].rounds for row in rows)


def test_choice_of_cases():
    names = lambda *suites, **options: [x.name for x in jobs.jobs(suites, device="cpu", **options)]
    assert names() == list(jobs.short("cpu"))
    assert {"head-bf16-15", "kl-ref-policy"} < set(names("head")) and "topk-30" not in names("head")
    assert "head-D4096" not in names("head") and "head-D4096" in names("full")
    assert names("head", cases=("head-D4096", "kl-*")) == [
        "head-D4096",
        "kl-ref-policy",
        "kl-policy-ref",
        "kl-jsd",
        "kl-fp32-ref-policy",
        "kl-fp32-policy-ref",
        "kl-fp32-jsd",
    ]
    assert names("step") == ["step", "step-tdpo2", "step-sparsepo"]
    assert names(cases=("step-short",)) == ["step-short"]
    (found,) = jobs.jobs((), device="cpu", cases=("head-bf16-30",), providers=("sepo", "cc*"))
    chosen = {c.name for c in found.contenders}
    assert {"sepo", "sepo:chunked", "cce"} <= chosen and not chosen & {"gemm", "dense"}
    with pytest.raises(InputError, match="expected cases of .*head-bf16-30.*; got nothing"):
        names("head", cases=("nothing",))
    short, step = (
        jobs.jobs((), device="cpu", cases=(n,), pairs=3)[0] for n in ("step-short", "step")
    )
    assert short.case.pairs == step.case.pairs == 3
    assert short.case.max_length < step.case.max_length


def test_a_suite_that_lacks_a_package_is_left_out(monkeypatch):
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None)
    assert jobs.lacking("step") == "transformers, accelerate not installed"
    assert [x.suite for x in jobs.jobs((), device="cpu")] == ["head", "select"]


def test_both_sides_take_turns():
    """Here first, then the base first; a row is told by its side."""
    asked = []

    class Side:
        def __init__(self, name):
            self.name = name

        def ask(self, what, job):
            asked.append((what, self.name))
            row = dict(provider="sepo", ours=True, status="measured", reason="", median=0.002)
            rows = [row | dict(quartiles=(0.001, 0.003), seconds=[0.002])]
            return rows, {"roof_flop_rate": 1.0}

    found = base.Beside(0, "one", 2, Side("here"), Side("base"), "0123456789abcdef")
    rows, code = run.run([found], tell=lambda text: None)
    assert code == 0 and [row["side"] for row in rows] == ["here", "base"]
    assert rows[1]["commit"] == "0123456789abcdef" and "commit" not in rows[0]
    assert [side for what, side in asked if what == "turn"] == ["here", "base", "base", "here"]
    line = found.text().splitlines()[-1]
    assert line.startswith("> sepo") and line.split()[-1] == "1.000"


def test_side_by_side():
    """Rounds are compared with those beside them: what slowed both down is in neither."""
    row = lambda side, name, *seconds, **more: (
        dict(side=side, provider=name, ours=True, status="measured", reason="", seconds=seconds)
        | dict(median=max(seconds, default=0.0), quartiles=(1.0, 3.0))
        | more
    )
    records = [row("here", "sepo", 1.0, 4.0, 1.0), row("base", "sepo", 1.5, 6.0, 9.0)]
    records += [row("here", "new", 1.0)]
    records += [row("base", "old", status="refused", reason="off by 1")]
    lines = base.side_by_side("one", records, "0123456789abcdef").splitlines()[3:]
    sepo, new, old = (line.removeprefix("> ").split() for line in lines)
    assert sepo == "sepo 4000.00 1000.00 3000.00 9000.00 1000.00 3000.00 1.500".split()
    assert new == "new 1000.00 1000.00 3000.00 not there".split()
    assert old == "old not there refused off by 1".split()


@pytest.fixture
def repository(tmp_path):
    """Two commits of a library with a bench of its own, which counts who is asked for a round."""
    git = lambda *args: subprocess.run(
        ["git", "-C", str(tmp_path), *args], check=True, capture_output=True
    )
    program = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import library
say = lambda x: print(json.dumps(x), flush=True)
say([["case", 2]])
for line in sys.stdin:
    what, number = json.loads(line)
    row = dict(provider="sepo", ours=True, status="passed", reason="", case="case", suite="head")
    row |= dict(median=library.SECONDS, quartiles=[1.0, 1.0], seconds=[library.SECONDS])
    say([[row | {"status": "measured" if what == "finish" else "passed"}], {}])
"""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text("raise SystemExit('the bench of the old commit')")
    (tmp_path / "library.py").write_text("SECONDS = 3.0")
    git("init", "-q")
    git("-c", "user.name=a", "-c", "user.email=a@b", "add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "old")
    (tmp_path / "library.py").write_text("SECONDS = 1.0")
    (tmp_path / "bench" / "run.py").write_text(program)
    return tmp_path


def test_the_other_commit_is_measured_with_this_bench(repository, monkeypatch):
    monkeypatch.setattr(base, "ROOT", repository)
    monkeypatch.setattr(base, "MEASURES", ("bench",))
    monkeypatch.setattr(base, "_data", lambda asked: None)
    with base.beside("HEAD", ("head",), dict(data=None, device="cpu")) as (entry,):
        rows, code = run.run([entry], tell=lambda text: None)
    assert code == 0 and [row["median"] for row in rows] == [1.0, 3.0]
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True
    )
    assert len(listed.stdout.splitlines()) == 1
    with (
        pytest.raises(InputError, match="git rev-parse"),
        base.beside("nowhere", (), {"data": None}),
    ):
        pass
    (repository / "bench" / "run.py").write_text("raise SystemExit('no such library')")
    with pytest.raises(InputError, match="stopped: no such library"):
        with base.beside("HEAD", (), {"data": None}):
            pass


def test_a_real_case_is_served(monkeypatch):
    """The other end of base.py: what a library prints is no answer, and options arrive."""
    options = dict(cases=("topk-30",), providers=("sepo",), rounds=1, device="cpu", data=None)
    with base.Side(ROOT, ("select",), options) as side:
        assert side.jobs() == [("topk-30", 1)]
        assert side.ask("gate", 0)[0][0]["status"] == "passed"
        side.ask("ready", 0)
        side.ask("turn", 0)
        rows, about = side.ask("finish", 0)
    assert rows[0]["status"] == "measured" and about["roof_byte_rate"] > 0


def test_a_native_extension_is_built_or_copied(tmp_path, monkeypatch):
    here, tree = tmp_path / "here", tmp_path / "tree"
    for folder in (here / "sepo_kernels", tree / "sepo_kernels", tree / "csrc"):
        folder.mkdir(parents=True)
    (here / "sepo_kernels" / "_C_avx2_torch_2_13.abi3.so").write_text("built")
    program = "open('sepo_kernels/_C_avx2_torch_2_13.abi3.so', 'w').write('its own')"
    (tree / "setup.py").write_text(program)
    monkeypatch.setattr(base, "ROOT", here)
    for differs, expected in (("", "built"), ("csrc/a.cpp", "its own")):
        monkeypatch.setattr(base, "_git", lambda *args, differs=differs: differs)
        base._build(tree, "0" * 40)
        assert (tree / "sepo_kernels" / "_C_avx2_torch_2_13.abi3.so").read_text() == expected
    (tree / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(InputError, match="000000000000 does not build: no compiler"):
        base._build(tree, "0" * 40)


def test_hours_before_they_are_spent(monkeypatch, capsys, tmp_path):
    """The old flags answer as `sepo plan` does, and say its name once."""
    monkeypatch.setattr(run, "measure", lambda *args: pytest.fail("something was measured"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: Pythia-410M")
    assert run.main(["--plan", str(recipe)]) == 0
    said = capsys.readouterr()
    assert said.err == f"bench: this is now: sepo plan {recipe}\n"
    cli.run(["plan", str(recipe)])
    assert capsys.readouterr().out == said.out and "GPU-hours" in said.out
    monkeypatch.setattr(tables, "table1", lambda: "the papers' hours")
    assert run.main(["--hours"]) == 0
    said = capsys.readouterr()
    assert said == ("the papers' hours\n", "bench: this is now: sepo plan --papers\n")
    assert run.main(["--plan", "other.yaml"]) == 2
    assert "bench: error: other.yaml: " in capsys.readouterr().err


def test_the_program_answers(tmp_path):
    """As a file: its own folder is no place to import from."""
    program = [sys.executable, str(ROOT / "bench" / "run.py"), "--help"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--base REV" in done.stdout
    assert run.main(["--case", "nothing", "--device", "cpu"]) == 2
