"""Check what a flag asks of optional packages, and of names that only they know."""

from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    is_flytekit_available,
)

from sepo.errors import InputError, one_line


def check_packages(args: TrainingArguments) -> None:
    """Raises InputError, naming the flag, for a tracker, optimiser or schedule that can't work here:
    else a run would notice when its models are loaded.
    """
    names = args.report_to or []
    _check_trackers([names] if isinstance(names, str) else names)
    for flag, check in (
        (f"--optim {_word(args.optim)}", _check_optimizer),
        (f"--lr_scheduler_type {_word(args.lr_scheduler_type)}", _check_scheduler),
    ):
        try:
            check(args)
        except (ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{flag}: {one_line(error)}") from error


def check_compiler(args: TrainingArguments) -> None:
    """Raises InputError for a backend or mode of torch.compile that there is not."""
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    known = [name.value.lower() for name in DynamoBackend]
    if backend is not None and backend.lower() not in known:
        raise InputError(f"--torch_compile_backend: expected {' | '.join(known)}, got {backend}")
    if mode is not None and backend in (None, "inductor"):
        from torch._inductor import list_mode_options

        if mode not in (modes := list_mode_options()):
            raise InputError(f"--torch_compile_mode: expected {' | '.join(modes)}, got {mode}")


def _word(choice: Any) -> str:
    """One of transformers' Enums of text as a user writes it; in their types it may be text still."""
    return str(getattr(choice, "value", choice))


def _check_trackers(names: list[str]) -> None:
    here = {*get_available_reporting_integrations(), *["flyte"] * is_flytekit_available()}
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = " | ".join(["none", "all", *INTEGRATION_TO_CALLBACK])
            raise InputError(f"--report_to: expected {known}, got {name}")
        if name not in here:
            raise InputError(f"--report_to {name}: its package is not installed")


def _check_optimizer(args: TrainingArguments) -> None:
    if args.optim.startswith(("galore", "apollo")) and args.optim_target_modules is not None:
        return _check_low_rank(args)
    model: Any = torch.nn.Linear(1, 1)  # transformers asks for one of its own; any module will do
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if isinstance(optimizer, type):  # else a factory, which needs the model
        optimizer([_probe(weight_decay=args.weight_decay)], **options)


def _check_low_rank(args: TrainingArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, None)
    except ValueError:  # it was found, and wants the model
        pass


def _check_scheduler(args: TrainingArguments) -> None:
    steps = 100
    own = args.lr_scheduler_kwargs
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([_probe()], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=None if isinstance(own, str) else own,  # parsed by now
    )


def _probe(**options) -> dict:
    """A parameter group of one number."""
    return {"params": [torch.nn.Parameter(torch.zeros(1))], **options}
