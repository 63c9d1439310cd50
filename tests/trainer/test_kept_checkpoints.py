"""Which checkpoints are kept, whatever the clock, a kill or the disk does."""

import os
import shutil

import pytest
import torch
from processes import exit_line
from saving_trainer import PAIRS, make_trainer

from sepo import SePOTrainer
from sepo.errors import InputError
from sepo.trainer.checkpoints import last_checkpoint, rotate, write_mark


def steps_in(folder):
    return sorted(int(p.name.removeprefix("checkpoint-")) for p in folder.glob("checkpoint-*"))


def test_a_clock_that_goes_back_does_not_delete_the_newest(tmp_path, monkeypatch):
    """Checkpoints are ordered by their step."""
    trainer = make_trainer(tmp_path, save_total_limit=2, num_train_epochs=2)
    original = trainer._rotate

    def rotate():
        for path in tmp_path.glob("checkpoint-*"):  # the later, the older
            second = 2e9 - 100 * int(path.name.removeprefix("checkpoint-"))
            os.utime(path, (second, second))
        original()

    monkeypatch.setattr(trainer, "_rotate", rotate)
    trainer.train()
    assert steps_in(tmp_path) == [5, 6]


def checkpoint(folder, step, *, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model").write_text("weights")
    if whole:
        write_mark(path, step=step, run={}, flags={}, unlogged=[])
    return path


@pytest.mark.parametrize(
    ("steps", "torn", "limit", "newest", "best", "left"),
    [
        ([2, 10, 9], [], 2, 10, None, [9, 10]),  # not by their names' letters
        ([2, 4, 6], [], None, 6, None, [2, 4, 6]),
        ([2, 4, 6], [], 0, 6, None, [2, 4, 6]),
        ([2, 4, 6], [], 1, 6, None, [6]),
        ([2, 4, 6], [], 1, 6, 2, [2, 6]),
        ([2, 4, 6], [], 2, 6, 2, [2, 6]),
        ([2, 4, 6, 8], [], 3, 8, 2, [2, 6, 8]),
        ([2, 4, 6], [], 2, 4, None, [2, 4]),  # 6 is of a run that was given up
        ([2, 4, 6], [6], 1, 4, None, [4]),
        ([2, 4, 6, 8], [4, 6], 2, 8, None, [2, 8]),  # a torn one can't be gone back to
    ],
)
def test_which_checkpoints_are_kept(tmp_path, steps, torn, limit, newest, best, left):
    paths = {step: checkpoint(tmp_path, step, whole=step not in torn) for step in steps}
    (tmp_path / "checkpoint-notes").mkdir()
    rotate(tmp_path, limit, paths[newest], best and str(paths[best]))
    assert sorted(int(p.name[11:]) for p in tmp_path.glob("checkpoint-[0-9]*")) == left
    assert (tmp_path / "checkpoint-notes").is_dir()


def test_what_a_kill_left_beyond_the_limit_is_collected(tmp_path, monkeypatch):
    """Killed after the last checkpoint, before an older one was deleted; nothing is saved again."""
    with monkeypatch.context() as patched:
        patched.setattr(SePOTrainer, "_rotate", lambda self: None)
        make_trainer(tmp_path, save_total_limit=1).train()
    assert steps_in(tmp_path) == [1, 2, 3]
    make_trainer(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert steps_in(tmp_path) == [3]


def test_the_last_step_is_kept_beside_the_best(tmp_path, monkeypatch):
    """Else a finished run would make its last steps again, whenever it is continued."""
    run = lambda: make_trainer(
        tmp_path, eval_pairs=PAIRS[:4], eval_strategy="steps", eval_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=1.0,
        warmup_steps=0, method="simpo",
    )  # fmt: skip
    first = run()
    first.train()
    best = first.state.best_global_step
    assert best < 3 and steps_in(tmp_path) == [best, 3] and first.args.save_total_limit == 1
    monkeypatch.setattr(SePOTrainer, "training_step", lambda *_: pytest.fail("a step"))
    again = run()
    again.train(resume_from_checkpoint=True)
    assert steps_in(tmp_path) == [best, 3]
    for name, expected in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], expected)


def test_weights_alone_are_rotated_too(tmp_path):
    make_trainer(tmp_path, save_only_model=True, save_total_limit=2).train()
    assert steps_in(tmp_path) == [2, 3]


def test_a_disk_without_room_is_noticed_before_training(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    size = sum(p.nbytes for p in trainer.model.parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    monkeypatch.setattr(SePOTrainer, "training_step", lambda *_: pytest.fail("a step"))
    with pytest.raises(InputError, match=r"expected room for the weights, .* the disk has"):
        trainer.train()


FULL = """
import resource, sys
import torch
from saving_trainer import make_trainer
from sepo.errors import exit_with_one_line
torch.set_num_threads(1)
def main():
    trainer = make_trainer(sys.argv[1])
    make_trainer(sys.argv[1], max_steps=1).train()
    largest = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    trainer.train(resume_from_checkpoint=True)
exit_with_one_line(main)
"""


@pytest.mark.parametrize(
    ("largest", "reason"),
    [
        (50_000, "File too large"),  # of the weights, 75 kB
        (100_000, "a write failed, perhaps for a full disk"),  # of the optimiser's state, 150 kB
        (400, "File too large"),
    ],
)
def test_a_disk_that_fills_later(tmp_path, largest, reason):
    """One line, the last good checkpoint is whole, and nothing is half there."""
    line = exit_line("-c", FULL, tmp_path / "out", str(largest))
    assert reason in line and f"{tmp_path / 'out' / 'checkpoint-1'} is whole" in line
    assert steps_in(tmp_path / "out") == [1]
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-1")
    again = make_trainer(tmp_path / "out")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
