"""A run killed at any moment and resumed is the uninterrupted one, bit by bit, and so is its log."""

import random

import psutil
import pytest
from processes import run_jobs, start, wait_for_lines
from training_run import make_run, read_log
from workers.phases import PHASES

pytestmark = pytest.mark.slow

RUN = dict(
    pairs=24,  # 6 steps an epoch
    eval_pairs=8,
    num_train_epochs=2,
    save_steps=2,
    save_total_limit=1,  # the one before must not go until the next is whole
    logging_steps=3,  # so that some checkpoints lie between two lines of the log
    eval_strategy="epoch",
)


PLACES = [(1, phase) for phase in PHASES]
PLACES += [(2, phase) for phase in ("forward", "generators", "evaluation")]
RESUME = ["--resume_from_checkpoint", "true"]


def same(found, expected):
    weights = [(path / "model.safetensors").read_bytes() for path in (found, expected)]
    assert weights[0] == weights[1]
    assert read_log(found) == read_log(expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole runs, runs killed in a phase or at random and resumed; and what the kills left."""
    path = tmp_path_factory.mktemp("runs")
    arguments, rng, jobs = make_run(path, **RUN), random.Random(0), []

    def job(ranks, name, *more, **kind):
        out = path / str(ranks) / name / "out"
        out.parent.mkdir(parents=True, exist_ok=True)
        argv = [*arguments, "--output_dir", str(out), *more]
        jobs.append(dict(argv=argv, ranks=ranks, **kind))

    for ranks in (1, 2):
        job(ranks, "whole")
        for _ in range(3 - ranks):
            job(ranks, "random", *RESUME, after=rng.uniform(0, 0.2))
        job(ranks, "random", *RESUME)
    for ranks, phase in PLACES:
        job(ranks, phase, phase=phase)
        job(ranks, phase, *RESUME)
    done = run_jobs(path, jobs)
    return path, arguments, {(j["ranks"], j["phase"]): j["left"] for j in done if "phase" in j}


@pytest.mark.parametrize(("ranks", "phase"), PLACES)
def test_killed_in_a_phase_and_resumed(runs, ranks, phase):
    path, _, left = runs
    assert (
        left[ranks, phase]["checkpoint"] == PHASES[phase].checkpoint
    )  # the kill was where it says
    same(path / str(ranks) / phase / "out", path / str(ranks) / "whole" / "out")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_and_resumed(runs, ranks):
    whole = runs[0] / str(ranks) / "whole" / "out"
    same(runs[0] / str(ranks) / "random" / "out", whole)
    log = read_log(whole)
    assert [line["step"] for line in log if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in log if "eval_loss" in line] == [6, 12]


def test_torchrun_ends_with_a_killed_rank(runs, tmp_path):
    path, arguments, _ = runs
    argv = [*arguments, "--output_dir", str(tmp_path)]
    process = start("-m", "sepo.train", *argv, ranks=2)
    wait_for_lines(process, tmp_path / "metrics.jsonl", 2)
    ranks = psutil.Process(process.pid).children()
    next(r for r in ranks if r.environ()["RANK"] == "1").kill()
    process.communicate(timeout=60)
    assert process.returncode != 0 and not any(rank.is_running() for rank in ranks)
    run_jobs(tmp_path, [dict(argv=[*argv, *RESUME], ranks=2)])
    same(tmp_path, path / "2" / "whole" / "out")
