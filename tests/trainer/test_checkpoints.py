"""A torn checkpoint is passed over, one of another run refused, and nothing is written then."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import transformers
from processes import ENVIRONMENT, exit_line
from saving_trainer import PAIRS, make_trainer
from training_run import make_run, read_log, write_store

from sepo import SePOConfig, SePOTrainer, train
from sepo.errors import InputError
from sepo.trainer.checkpoints import MARK, last_checkpoint, remove
from sepo.trainer.methods import METHODS, ResponseSums

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The arguments of a run of three steps, and its output directory."""
    path = tmp_path_factory.mktemp("run")
    arguments = make_run(path)
    train.main([*arguments, "--output_dir", str(path / "out")])
    return arguments, path / "out"


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def truncate(file):
    file.write_bytes(file.read_bytes()[:-2])  # a mark ends with a newline


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("tear", [truncate, flip_a_bit, lambda file: file.unlink()])
@pytest.mark.parametrize("name", [*FILES, MARK])
def test_a_torn_checkpoint_is_passed_over(tmp_path, trained, name, tear, caplog):
    shutil.copytree(trained[1], tmp_path / "out")
    if (name, tear) == (MARK, flip_a_bit):
        tear = lambda file: file.write_bytes(b"\0" * file.stat().st_size)  # as after a power cut
    tear(tmp_path / "out" / "checkpoint-3" / name)
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    assert f"checkpoint-3 is passed over: {'no whole ' * (name == MARK)}{name}" in caplog.text
    with pytest.raises(InputError, match=f"checkpoint-3 is not a complete checkpoint: .*{name}"):
        make_trainer(tmp_path / "out").train(str(tmp_path / "out" / "checkpoint-3"))


def test_no_checkpoint_at_all(tmp_path, trained):
    assert last_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="nowhere is not a complete checkpoint"):
        train.main(
            [*trained[0], "--output_dir", str(tmp_path / "new")]
            + ["--resume_from_checkpoint", str(tmp_path / "nowhere")]
        )
    assert not (tmp_path / "new").exists()


def test_a_removed_checkpoint_loses_its_mark_first(tmp_path, trained, monkeypatch):
    shutil.copytree(trained[1], tmp_path / "out")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before
    remove(tmp_path / "out" / "checkpoint-3")
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-2")


OTHER_RUNS = {
    "method": (["--method", "sepo-rand"], "--method sepo, got sepo-rand"),
    "pairs_per_step": (["--pairs_per_step", "3"], "--pairs_per_step 4, got 3"),
    "fraction": (["--fraction", "0.5"], "--fraction 0.3, got 0.5"),
    "mass": (["--select", "mass"], "--fraction 0.3, got mass"),
    "first_token": (["--first_token", "released"], "--first_token paper, got released"),
    "rejected_fraction": (["--rejected_fraction", "0.5"], "--rejected_fraction None, got 0.5"),
    "gamma": (["--gamma", "3"], "--gamma 2.0, got 3.0"),
    "margin": (["--margin", "0"], "--margin 0.5, got 0.0"),
    "seed": (["--seed", "1"], r"seed of .* 42, got 1"),
    "data_seed": (["--data_seed", "1"], r"seed of .* 42, got 1"),
    "number of pairs": (11, "number of pairs 12, got 11"),
    "other pairs": (None, r"data \(hash of its pairs\) [0-9a-f]{16}, got"),
}


@pytest.mark.parametrize("asked", ["true", "checkpoint"])
@pytest.mark.parametrize("difference", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, trained, difference, asked):
    (arguments, old), (more, message) = trained, OTHER_RUNS[difference]
    shutil.copytree(old, tmp_path / "out")
    before = content(tmp_path)
    if not isinstance(more, list):
        store = tmp_path.with_name(tmp_path.name + "-store")
        write_store(store, PAIRS[:more] if more else [replace(PAIRS[0], id="x"), *PAIRS[:0:-1]])
        more = ["--dataset_name", str(store)]
    path = tmp_path / "out" / "checkpoint-2"
    where = (
        ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "true"]
        if asked == "true"
        else ["--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", str(path)]
    )
    with pytest.raises(InputError, match=f"is of another run: expected {message}"):
        train.main([*arguments, *more, *where])
    assert content(tmp_path) == before and not (tmp_path / "new").exists()


OF_A_MASK = {
    "learned": {"mask_kind", "independent_masks", "mask_layernorm"},
    "activation": {"mask_norm"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_every_flag_that_its_loss_reads(name):
    method, asked = METHODS[name], set()

    class Spy:
        def __getattr__(self, flag):
            asked.add(flag)
            return getattr(args, flag)

    args = SePOConfig(output_dir="unused", method=name, use_cpu=True)
    segments = ResponseSums(*torch.rand(len(fields(ResponseSums)), 4))
    for read in (method.loss, method.reward):
        if read is not None:
            read(segments, Spy())
    for made in (method.direction, method.rule):
        if made is not None:
            made(Spy())
    assert set(method.settings) == asked | OF_A_MASK.get(method.mask, set())


def test_the_refusal_is_one_line(tmp_path, trained):
    arguments, old = trained
    line = exit_line(
        *("-m", "sepo.train", *arguments, "--output_dir", tmp_path / "new"),
        *("--method", "simpo", "--resume_from_checkpoint", old / "checkpoint-2"),
    )
    assert line == (
        f"sepo: error: {old / 'checkpoint-2'} is of another run: expected --method sepo, got simpo"
    )


def test_what_may_change_when_a_run_goes_on(tmp_path, trained):
    """The budget, the learning rate, the number of epochs; a fraction that the method ignores."""
    arguments, old = trained
    where = ["--output_dir", str(tmp_path / "new")]
    where += ["--resume_from_checkpoint", str(old / "checkpoint-2")]
    more = ["--max_tokens_per_batch", "100", "--learning_rate", "1e-3", "--num_train_epochs", "2"]
    train.main([*arguments, *where, *more])
    assert [line["step"] for line in read_log(tmp_path / "new")] == [1, 2, 3, 4, 5, 6, 6]
    simpo = make_trainer(tmp_path / "simpo", method="simpo", fraction=0.3)
    simpo.train()
    again = make_trainer(tmp_path / "simpo", method="simpo", fraction=0.5)
    again.train(resume_from_checkpoint=True)


ENDS = {  # how many steps are asked for, when three are done
    "steps": dict(max_steps=3),
    "epochs": dict(num_train_epochs=1),
    "within an epoch": dict(max_steps=2, save_steps=2),
    "fewer": dict(max_steps=1),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_finished_run_stays_finished(tmp_path, end, caplog, monkeypatch):
    """However often it is continued: nothing is trained, the same is saved, the log is the same."""
    first = dict(max_steps=3) if end == "fewer" else ENDS[end]
    arguments = dict(method="simpo", learning_rate=0.01, logging_steps=2)
    run = lambda **more: make_trainer(tmp_path, **arguments, **more)
    once = run(**first)
    once.train(), once.save_model()
    done, before, log = once.state.global_step, content(tmp_path), read_log(tmp_path)
    monkeypatch.setattr(SePOTrainer, "training_step", lambda *_: pytest.fail("a step"))
    for _ in range(2):
        again = run(**ENDS[end])
        again.train(resume_from_checkpoint=True), again.save_model()
        assert again.state.global_step == done
        assert f"step {done} of {ENDS[end].get('max_steps', 3)} is done" in caplog.text
    after = content(tmp_path)
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {"metrics.jsonl", "training_args.bin"}  # the time that it took; the time
    assert read_log(tmp_path) == log
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "train_runtime" in last and "train_loss" not in last  # of no step


def test_the_loss_of_a_run_that_goes_on_is_of_its_own_steps(tmp_path):
    """Not of those before its checkpoint that were not logged yet."""
    if "num_steps_trained" not in inspect.getsource(transformers.trainer):
        pytest.skip("this transformers divides by the steps of all processes")
    arguments = dict(method="simpo", learning_rate=0.01, logging_steps=2, warmup_steps=0)
    arguments["lr_scheduler_type"] = "constant"
    make_trainer(tmp_path, max_steps=3, **arguments).train()
    again = make_trainer(tmp_path, max_steps=4, **arguments)
    found = again.train(resume_from_checkpoint=True).training_loss
    alone = make_trainer(tmp_path / "alone", max_steps=4, **arguments | {"logging_steps": 1})
    alone.train()
    steps = [line["loss"] for line in read_log(tmp_path / "alone") if "loss" in line]
    assert found == pytest.approx(steps[3], rel=1e-5)


def test_two_trainers_of_one_folder(tmp_path, trained):
    """The second is refused before it loads a model; the first goes on."""
    arguments, old = trained
    shutil.copytree(old, tmp_path / "out")
    before = content(tmp_path)
    where = ["--output_dir", str(tmp_path / "out")]
    holder = "import sys, time; from sepo.system.lock import lock\nwith lock(sys.argv[1]):\n"
    holder += "    print('held', flush=True); time.sleep(60)"
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "out")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stdout.readline() == "held\n"
        for resume in ([], ["--resume_from_checkpoint", "true"]):
            message = f"{tmp_path / 'out'} is being written to by process {first.pid} on"
            with pytest.raises(InputError, match=message):
                train.main([*arguments, *where, *resume, "--model_name_or_path", "nowhere"])
        with pytest.raises(InputError, match=message):
            make_trainer(tmp_path / "out").train(resume_from_checkpoint=True)
        assert {k: v for k, v in content(tmp_path).items() if k.suffix != ".lock"} == before
    finally:
        first.kill(), first.wait(), first.stdout.close()
    train.main([*arguments, *where, "--resume_from_checkpoint", "true"])  # a kill lets it go
    assert not list((tmp_path / "out").glob(".*"))


def test_the_whole_of_a_run_is_locked(tmp_path, trained, monkeypatch):
    """From before the data is read until the model is saved."""
    held = lambda: (tmp_path / "out" / ".sepo.lock").is_file()
    seen = {}
    for owner, name in ((train, "load_pairs"), (SePOTrainer, "training_step"), (SePOTrainer, "save_model")):  # fmt: skip
        original = getattr(owner, name)

        def spy(*args, name=name, original=original, **kwargs):
            seen.setdefault(name, []).append(held())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    train.main([*trained[0], "--output_dir", str(tmp_path / "out")])
    assert {name: all(found) for name, found in seen.items()} == dict.fromkeys(seen, True)
    assert len(seen) == 3 and not held()


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/out"])
def test_an_output_directory_that_can_not_be(tmp_path, trained, place):
    """Before anything is loaded."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{place}: expected a folder to write to, got"):
        where = ["--output_dir", str(tmp_path / place), "--resume_from_checkpoint", "true"]
        train.main([*trained[0], *where, "--model_name_or_path", "nowhere"])


def test_weights_alone_can_not_be_continued(tmp_path):
    make_trainer(tmp_path, save_only_model=True).train()
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(InputError, match="--save_only_model writes none"):
        make_trainer(tmp_path).train(str(tmp_path / "checkpoint-3"))


def test_what_a_killed_run_left_does_not_get_into_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "rng_state_7.pth").write_bytes(b"of another number of ranks")
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    mark = json.loads((tmp_path / "checkpoint-1" / MARK).read_text())
    assert set(FILES) < set(mark["files"]) and "rng_state_7.pth" not in mark["files"]


def test_evaluations_outside_the_steps_are_logged_once(tmp_path):
    keys = lambda: [(line["step"], "eval_loss" in line) for line in read_log(tmp_path)]
    first = make_trainer(tmp_path, eval_pairs=PAIRS[:3], eval_on_start=True, save_total_limit=1)
    first.train()
    training = [(1, False), (2, False), (3, False), (3, False)]
    assert keys() == [(0, True), *training]
    again = make_trainer(tmp_path, eval_pairs=PAIRS[:3], eval_on_start=True)
    again.evaluate()  # of this process, before it trains
    again.train(resume_from_checkpoint=True)
    assert keys() == [(0, True), (0, True), *training]


@pytest.mark.parametrize("entry", ["step", "run", "unlogged"])
def test_what_a_mark_says_is_under_its_checksum(tmp_path, trained, entry, caplog):
    """A flipped bit of a loss that is not logged yet would be another loss in the log."""
    shutil.copytree(trained[1], tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-3" / MARK
    mark = json.loads(file.read_text())
    mark[entry] = {"step": 2, "run": mark["run"] | {"seed": 1}, "unlogged": [{"loss": 0}]}[entry]
    file.write_text(json.dumps(mark))
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert f"no whole {MARK}" in caplog.text


def test_a_mark_without_a_checksum_is_read(tmp_path, trained):
    """As older versions wrote it."""
    shutil.copytree(trained[1], tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-3" / MARK
    mark = json.loads(file.read_text())
    assert len(mark.pop("check")) == 64
    file.write_text(json.dumps(mark))
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-3")
