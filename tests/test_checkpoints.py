"""A torn checkpoint is passed over, one of another run refused, and nothing is written then."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from processes import exit_line
from tiny import random_scored_pairs, tiny_model
from training_run import make_run, read_log, write_store

from sepo import SePOConfig, SePOTrainer, train
from sepo.checkpoints import MARK, last_checkpoint, remove
from sepo.errors import InputError
from sepo.methods import METHODS, Segments

PAIRS = random_scored_pairs(12)
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def make_trainer(path, *, pairs=PAIRS, eval_pairs=None, **args):
    defaults = dict(
        output_dir=str(path),
        pairs_per_step=4,
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    return SePOTrainer(tiny_model(), SePOConfig(**{**defaults, **args}), pairs, eval_pairs)


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
    "mass": (["--fraction", "mass"], "--fraction 0.3, got mass"),
    "first_token": (["--first_token", "official"], "--first_token paper, got official"),
    "rejected_fraction": (["--rejected_fraction", "0.5"], "--rejected_fraction None, got 0.5"),
    "gamma": (["--gamma", "3"], "--gamma 2.0, got 3.0"),
    "margin": (["--margin", "0"], "--margin 0.5, got 0.0"),
    "seed": (["--seed", "1"], r"seed of .* 42, got 1"),
    "data_seed": (["--data_seed", "1"], r"seed of .* 42, got 1"),
    "number of pairs": (11, "number of pairs 12, got 11"),
    "other pairs": (None, r"data \(hash of the lengths of its pairs\) [0-9a-f]{16}, got"),
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
    "learned": {"mask", "independent_masks", "mask_layernorm"},
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
    segments = Segments(*torch.rand(len(fields(Segments)), 4))
    for read in (method.loss, method.reward):
        if read is not None:
            read(segments, Spy())
    if method.direction is not None:
        method.direction(Spy())
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
