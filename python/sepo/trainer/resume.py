"""A Trainer that may be killed at any moment: its checkpoints are whole, and so is its log.

One order makes it simple: everything that is logged at step n is logged before checkpoint n is
written, and the log is rebuilt from the checkpoint. So a line is there exactly once, and what was
done after the checkpoint is done again.
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from sepo.errors import InputError
from sepo.system.lock import lock
from sepo.trainer.checkpoints import (
    check_room,
    find_checkpoint,
    read_mark,
    remove,
    rotate,
    whole_mark,
    write_mark,
)
from sepo.trainer.config import SePOConfig
from sepo.trainer.identity import (
    OF_THE_OPTIMISER,
    changed_flags,
    check_same_run,
    describe_flags,
    notes,
)
from sepo.trainer.metrics import MetricsFile, RunningMeans

T = TypeVar("T")
CHUNK = 1 << 24  # weights looked at at once
OF_STEPS = ("train_loss", "train_samples_per_second", "train_steps_per_second")
# what a disk or a folder can do to a writer; a connection's errors have other numbers
OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip


class ResumableTrainer(Trainer):
    """One writer a folder, and nothing broken in it.

    Raises InputError for a checkpoint of another run than `run` (see `sepo.trainer.identity`), for an
    output directory that another process is writing to, that has no room for a checkpoint or
    that can't be written to any more, and for weights that are not finite.
    """

    args: SePOConfig
    model: nn.Module  # of transformers, or a PeftModel around one

    def __init__(self, model: nn.Module, args: SePOConfig, *, run: dict | None, **kwargs):
        self.run, self._flags = run, describe_flags(args)
        asked = args.resume_from_checkpoint
        if run is not None and asked is not None and os.path.isdir(asked):
            # before Trainer makes the output directory
            of_rank_0(args, lambda: check_same_run(asked, run))
        super().__init__(model, args, **kwargs)
        self._means = RunningMeans()
        self._metrics_file = MetricsFile(Path(self.output_dir) / "metrics.jsonl")
        self._mark: dict | None = None  # of the checkpoint that training goes on from
        self._newest: Path | None = None  # checkpoint of this run in its output directory
        self._limit = args.save_total_limit
        self.add_callback(_SaveLast())  # after the user's: it must see what they asked for
        self.add_callback(_ContinueLog(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` takes the last complete checkpoint, if there is one.

        A checkpoint that a kill left half-written is passed over for the one before. One at or
        beyond the last step is loaded, and nothing is trained. Raises InputError for a path to one
        that is not whole, and for one of another run.
        """
        with ExitStack() as held:
            begin = lambda: self._begin(held, resume_from_checkpoint)
            checkpoint = of_rank_0(self.args, begin)
            self._mark = None if checkpoint is None else read_mark(checkpoint)
            # what was logged before training, say by evaluate(), belongs to this process
            history = [entry for entry in self.state.log_history if entry["step"] == 0]
            self._newest = None
            if checkpoint is not None:
                here = Path(self.output_dir) / Path(checkpoint).name
                if here.exists() and here.samefile(checkpoint):
                    self._newest = here
                self.args.eval_on_start = False  # done before step 1, and in the checkpoint's log
                state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
                history += state["log_history"]
            if self.is_world_process_zero():
                with self._or_one_line(self._metrics_file.path):
                    self._metrics_file.rewrite(history)
            # by _rotate alone: nothing older is deleted before the next is whole, nor the last
            # at the end, for a best one
            self._limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            finally:
                self.args.save_total_limit = self._limit
            self._check_weights()
            self._rotate()  # a kill may have come between a checkpoint and this
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; raises InputError for weights that are not finite, before anything is written."""
        self._check_weights()
        with self._or_one_line(Path(output_dir or self.output_dir)):
            super().save_model(output_dir, _internal_call)

    def save_state(self) -> None:
        with self._or_one_line(Path(self.output_dir)):
            super().save_state()

    @property
    def output_dir(self) -> str:
        """The flag's, or what TrainingArguments puts in the place of none."""
        return self.args.output_dir or ""

    def _begin(self, held: ExitStack, asked: str | bool | None) -> str | None:
        """Hold the output directory, and find what training goes on from; on rank 0."""
        held.enter_context(lock(self.output_dir))
        check_room(Path(self.output_dir), self._checkpoint_bytes())
        checkpoint = find_checkpoint(asked, self.output_dir)
        if checkpoint is None or self.run is None:
            return checkpoint
        check_same_run(checkpoint, self.run)
        for note in notes(whole_mark(checkpoint), self.run, self._flags):
            logging.getLogger(__name__).warning(f"{checkpoint} {note}")
        return checkpoint

    def _checkpoint_bytes(self) -> int:
        """At least: the weights that are saved."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        saved = trained if hasattr(self.model, "peft_config") else list(self.model.parameters())
        return sum(p.nbytes for p in saved)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        begun = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *rest
        )
        if self.state.global_step < max_steps:
            return begun
        if self._mark is not None and self.is_world_process_zero():
            logging.getLogger(__name__).warning(
                f"step {self.state.global_step} of {max_steps} is done: nothing is trained"
            )
        return num_train_epochs, 0  # Trainer would look at it after one step more

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; then the flags that changed, which the checkpoint's state would undo."""
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        if optimizer is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups = optimizer.param_groups
        told = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]
        rates = list(getattr(scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        changed = {
            name: values
            for name, values in changed_flags(self._mark or {}, self._flags).items()
            if name in OF_THE_OPTIMISER
        }
        if not changed:
            return
        if self.is_deepspeed_enabled or scheduler is None or not hasattr(scheduler, "lr_lambdas"):
            keeper = "DeepSpeed" if self.is_deepspeed_enabled else "this --lr_scheduler_type"
            name, (was, now) = next(iter(changed.items()))
            raise InputError(
                f"{checkpoint}: expected --{name} {was}, which {keeper} goes on with, got {now}"
            )
        scheduler.base_lrs = rates
        scheduler._last_lr = [
            rate * share(scheduler.last_epoch)
            for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, new, rate in zip(optimizer.param_groups, told, scheduler._last_lr, strict=True):
            group.update(new, lr=rate)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._mark is not None and self._mark["step"] == self.state.global_step:
            logs = {k: v for k, v in logs.items() if k not in OF_STEPS}  # none was made
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with self._or_one_line(self._metrics_file.path):
                self._metrics_file.append({"step": self.state.global_step, **logs})

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Raises InputError for a trained weight that is not finite; waits for the device once."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        finite = [_is_finite(p).to(self.args.device) for p in trained.values()]
        for name, is_fine in zip(
            trained, torch.stack(finite).tolist() if finite else (), strict=True
        ):
            if not is_fine:
                raise InputError(
                    f"step {self.state.global_step}: expected finite weights, got some in {name} "
                    f"that are not; nothing of them is saved, {self._whole()}: try a lower "
                    "--learning_rate"
                )

    def _whole(self) -> str:
        """Say what of the run can be relied on."""
        if self._newest is None or not self._newest.is_dir():
            return "no checkpoint was written before"
        return f"{self._newest} is whole"

    @contextmanager
    def _or_one_line(self, place: Path) -> Iterator[None]:
        """Writing to `place`: what the disk refuses is the user's to mend."""
        try:
            yield
        except (InputError, OSError, SafetensorError, RuntimeError) as error:
            # what a file of ours says of the disk says nothing of the run
            cause = error.__cause__ if isinstance(error, InputError) else error
            if cause is None or (reason := _of_the_disk(cause)) is None:
                raise
            if place.name.startswith("checkpoint-") and self.args.should_save:
                remove(place)
            raise InputError(f"{place} can't be written: {reason}; {self._whole()}") from error

    def _rotate(self) -> None:
        if self.args.should_save and self._newest is not None:
            best = self.state.best_model_checkpoint
            rotate(self._newest.parent, self._limit, self._newest, best)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with self._or_one_line(folder):
            self._write_checkpoint(folder, model, trial)
        self._newest = folder
        self._rotate()

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial) -> None:
        args = self.args
        if args.should_save:
            remove(folder)  # what a killed run left there would get into the mark
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        unlogged = gather_object([self._unlogged()])
        self.accelerator.wait_for_everyone()  # every rank wrote the state of its generators
        if args.save_only_model or not args.should_save or self.run is None:
            return  # without its optimiser there is nothing to go on with
        step = self.state.global_step
        write_mark(folder, step=step, run=self.run, flags=self._flags, unlogged=unlogged)

    def _unlogged(self) -> dict:
        """Collect what the next line of the log says about steps that this checkpoint has behind it."""
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
        self._total_loss_scalar -= mine["loss"]  # train_loss is of this process's steps
        self._globalstep_last_logged -= mine["steps"]
        self._means.restore([mine["means"]])


def _is_finite(parameter: nn.Parameter) -> torch.Tensor:  # () bool
    mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.stack([chunk.isfinite().all() for chunk in mine.reshape(-1).split(CHUNK)]).all()


def of_rank_0(args: SePOConfig, choose: Callable[[], T]) -> T:
    """Run `choose` on rank 0 and broadcast the result, or its InputError, to every rank."""
    found, error = None, None
    if args.process_index == 0:
        try:
            found = choose()
        except InputError as problem:
            error = str(problem)
    found, error = broadcast_object_list([found, error])
    if error is not None:
        raise InputError(error)
    return found


def _of_the_disk(error: BaseException) -> str | None:
    """The reason in one line if the disk or a folder refused to be written; None: a bug."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in OF_THE_DISK else None
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, SafetensorError) and "os error" in text:
        return text
    # torch.save's writer, which says no more
    return "a write failed, perhaps for a full disk" if "inline_container" in text else None


class _SaveLast(TrainerCallback):
    """At the end of an epoch: save after its log and its evaluation, not between them.

    Trainer saves by steps before it evaluates by epochs; killed between the two, the evaluation
    would never be made up for.
    """

    def __init__(self):
        self._put_off = False

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step % len(kwargs["train_dataloader"]) == 0
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
