"""A Trainer that may be killed at any moment: its checkpoints are whole, and so is its log.

One order makes it simple: everything that is logged at step n is logged before checkpoint n is
written, and the log is rebuilt from the checkpoint. So a line is there exactly once, and what was
done after the checkpoint is done again.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import rotate_checkpoints

from sepo.checkpoints import check_same_run, find_checkpoint, read_mark, remove, write_mark
from sepo.config import SePOConfig
from sepo.errors import InputError
from sepo.metrics import MetricsFile, RunningMeans


class ResumableTrainer(Trainer):
    """Raises InputError for a checkpoint of another run than `run` (see `describe_run`)."""

    def __init__(self, model: nn.Module, args: SePOConfig, *, run: dict | None, **kwargs):
        self.run = run
        asked = args.resume_from_checkpoint
        if run is not None and asked is not None and Path(asked).is_dir():
            check_same_run(asked, run)  # before Trainer makes the output directory
        super().__init__(model, args, **kwargs)
        self._means = RunningMeans()
        self._metrics_file = MetricsFile(Path(args.output_dir) / "metrics.jsonl")
        self._mark: dict | None = None  # of the checkpoint that training goes on from
        self.add_callback(_SaveLast())  # after the user's: it must see what they asked for
        self.add_callback(_ContinueLog(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; `resume_from_checkpoint=True` takes the last complete checkpoint, if there is one.

        A checkpoint that a kill left half-written is passed over for the one before. Raises
        InputError for a path to one that is not whole, and for one of another run.
        """
        checkpoint = self._of_rank_0(lambda: self._find(resume_from_checkpoint))
        self._mark = None if checkpoint is None else read_mark(checkpoint)
        # what was logged before training, say by evaluate(), belongs to this process
        history = [entry for entry in self.state.log_history if entry["step"] == 0]
        if checkpoint is not None:
            self.args.eval_on_start = False  # done before step 1, and in the checkpoint's log
            state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
            history += state["log_history"]
        if self.is_world_process_zero():
            self._metrics_file.rewrite(history)
        return super().train(checkpoint, **kwargs)

    def _find(self, asked: str | bool | None) -> str | None:
        checkpoint = find_checkpoint(asked, self.args.output_dir)
        if checkpoint is not None:
            check_same_run(checkpoint, self.run)
        return checkpoint

    def _of_rank_0(self, choose: Callable):
        """What rank 0 chose, and its InputError, on every rank: they must not see the disk differ."""
        found, error = None, None
        if self.is_world_process_zero():
            try:
                found = choose()
            except InputError as problem:
                error = str(problem)
        found, error = broadcast_object_list([found, error])
        if error is not None:
            raise InputError(error)
        return found

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        args = self.args
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if args.should_save:
            remove(folder)  # what a killed run left there would get into the mark
        self.accelerator.wait_for_everyone()
        # nothing older is deleted before the mark is there
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        unlogged = gather_object([self._unlogged()])
        self.accelerator.wait_for_everyone()  # every rank wrote the state of its generators
        if not args.should_save:
            return
        if not args.save_only_model:  # else there is no optimiser to go on with
            write_mark(folder, step=self.state.global_step, run=self.run, unlogged=unlogged)
        best = self.state.best_model_checkpoint
        rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)

    def _unlogged(self) -> dict:
        """What the next line of the log says about steps that this checkpoint has behind it."""
        return {
            "loss": self._tr_loss.item(),
            "steps": self.state.global_step - self._globalstep_last_logged,
            "means": self._means.state(),
        }

    def _continue_log(self) -> None:
        if self._mark is None:
            return
        ranks, me = self._mark["unlogged"], self.args.process_index
        if len(ranks) == self.args.world_size:
            mine = ranks[me]
        else:  # the loss is averaged over ranks, the means are summed
            loss = sum(rank["loss"] for rank in ranks) / len(ranks)
            mine = ranks[0] | {"loss": loss, "means": {}}
            if me == 0:
                self._means.restore([rank["means"] for rank in ranks])
        self._tr_loss += mine["loss"]
        self._globalstep_last_logged -= mine["steps"]
        self._means.restore([mine["means"]])


def describe_run(
    model: nn.Module,
    args: SePOConfig,
    *,
    lengths: np.ndarray,  # (pairs,) int64 tokens read
    selected: np.ndarray,  # (pairs,) int64 tokens used by the loss
    seed: int,
    selects: bool,  # whether the method looks at the fractions
    settings: tuple[str, ...],  # flags that its loss reads
) -> dict:
    """What must be the same for a checkpoint to be continued, whatever the number of ranks."""
    digest = hashlib.sha256(np.stack([lengths, selected]).astype("<i8").tobytes())
    fractions = (args.fraction, args.rejected_fraction)
    return {
        "method": args.method,
        "pairs": len(lengths),
        "pairs_per_step": args.pairs_per_step,
        "fraction": args.fraction if selects else None,
        "rejected_fraction": args.rejected_fraction if selects else None,
        "mass": args.mass if selects and "mass" in fractions else None,
        "first_token": args.first_token if selects else None,
        "seed": seed,
        "lengths": digest.hexdigest()[:16],
        "trained": get_model_param_count(model, trainable_only=True),
        "loss": {name: getattr(args, name) for name in settings},
    }


class _SaveLast(TrainerCallback):
    """At the end of an epoch: save after its log and its evaluation, not between them.

    Trainer saves by steps before it evaluates by epochs; killed between the two, the evaluation
    would never be made up for.
    """

    def __init__(self):
        self._put_off = False

    def on_step_end(self, args, state, control, *, train_dataloader, **kwargs):
        last = state.global_step % len(train_dataloader) == 0
        if control.should_save and (
            last or control.should_training_stop or control.should_epoch_stop
        ):
            control.should_save, self._put_off = False, True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self._put_off
        self._put_off = False
        return control


class _ContinueLog(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._continue_log()
