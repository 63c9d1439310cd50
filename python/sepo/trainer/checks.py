"""Refuse what a SePOConfig can't be, each in a line that names the flag; warn of what is idle."""

import json
import os
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from sepo.errors import InputError
from sepo.flags.dtype_note import warn_if_slow
from sepo.flags.options import say_idle
from sepo.flags.packages import check_packages
from sepo.flags.selection import uses_mass
from sepo.flags.values import in_yaml
from sepo.trainer.inherited import idle_inherited
from sepo_kernels.devices import INTERPRET

Config = Any  # a SePOConfig, whose file imports this one
POSITIVE = (
    "pairs_per_step", "max_tokens_per_batch", "max_length", "head_budget", "lora_r", "lora_alpha",
    "beta", "gamma", "ddp_timeout", "ddp_bucket_cap_mb",
)  # fmt: skip
NOT_NEGATIVE = (
    "dpop_lambda", "tdpo2_alpha", "sft_weight", "mask_l1", "kl_mask_l1", "mask_weight_decay",
    "mask_learning_rate", "learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon",
    "warmup_steps", "eval_delay", "save_total_limit",
)  # fmt: skip
FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # of flags that take a mapping
SEEDS = ("seed", "data_seed")
MOST = 1 << 53
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # of its own, instead of ours


def check_together(
    args: Config,
    choices: dict[str, Any],  # flag -> the Literal of its words
) -> None:
    """Refuse values that are no choice, and flags that don't go together."""
    for name, kind in choices.items():
        value = getattr(args, name)
        if value not in get_args(kind) and (value is not None or name != "rejected_select"):
            raise InputError(
                f"--{name}: expected {' | '.join(get_args(kind))}, got {in_yaml(value)}"
            )
    _check_selection(args)
    if args.mask_kind == "random" and args.independent_masks:
        raise InputError(
            "--mask_kind random draws one mask: expected --independent_masks false, got true"
        )
    for other in ("gradient_checkpointing", "torch_compile"):
        # compiled parts hide their GEMMs from whoever would save their outputs
        if args.selective_checkpointing and getattr(args, other):
            raise InputError(f"--selective_checkpointing: expected without --{other}, got both")
    for flag in ("load_in_4bit", "load_in_8bit"):
        if getattr(args, flag) and not args.use_peft:
            raise InputError(
                f"--{flag}: expected --use_peft too, quantised weights can't be trained"
            )
        if getattr(args, flag) and not _has_gpu(args):
            # bitsandbytes repacks weights for a CPU at the first pass without a gradient (the
            # comparison of a model with itself, an evaluation) and has no gradient from then on
            raise InputError(f"--{flag}: bitsandbytes trains on a GPU, got a CPU")
    if args.fp16 and not _has_gpu(args):
        raise InputError("--fp16: float16 is computed with on a GPU, got a CPU; see --bf16")
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("expected --load_in_4bit or --load_in_8bit, got both")
    _check_fused(args)
    check_packages(args)
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process: start with "
            f"torchrun --nproc-per-node {args.n_gpu} -m sepo.train"
        )


def _check_fused(args: Config) -> None:
    """--fused_layers beside transformers' own flags for the same: one of them decides."""
    wish, liger = args.fused_layers, "--fused_layers liger"
    for flag, given, agrees in (
        ("--use_liger_kernel", args.use_liger_kernel, ("auto", "liger")),
        ("--torch_compile", args.torch_compile, ("auto", "compile")),
        ("--selective_checkpointing", args.selective_checkpointing, ("auto", "liger", "none")),
    ):
        if given and wish not in agrees:
            expected = " or ".join(agrees)
            raise InputError(f"{flag}: expected --fused_layers {expected} beside it, got {wish}")
    if args.use_liger_kernel:
        if args.torch_compile:
            raise InputError("--use_liger_kernel: expected without --torch_compile, got both")
        # Trainer would let Liger change classes, for every model to come
        args.fused_layers, args.use_liger_kernel, liger = "liger", False, "--use_liger_kernel"
    if args.fused_layers == "liger" and not (_has_gpu(args) or INTERPRET):
        raise InputError(f"{liger}: its kernels need a GPU, got a CPU")
    for loss in LIGER_LOSSES:
        if (args.liger_kernel_config or {}).get(loss):
            raise InputError(
                f"--liger_kernel_config {loss}: expected false, got true: "
                "the loss needs the head at the selected rows only"
            )


def check_numbers(args: TrainingArguments) -> None:
    """Refuse numbers that a flag can't be."""
    for names, words, holds in (
        (POSITIVE, "a positive number", lambda value: value > 0),
        (NOT_NEGATIVE, "at least 0", lambda value: value >= 0),
        (SEEDS, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
        (
            ("lora_dropout", "adam_beta1", "adam_beta2"),
            "a number in [0, 1)",
            lambda value: 0 <= value < 1,
        ),
        (("label_smoothing",), "a number in [0, 0.5)", lambda value: 0 <= value < 0.5),
        (("selection_quantile",), "a number in [0, 1]", lambda value: 0 <= value <= 1),
        (("max_steps",), "a positive number, or -1 for --num_train_epochs", lambda n: n >= -1),
    ):
        for name in names:
            if (value := getattr(args, name)) is not None and not holds(value):
                raise InputError(f"--{name}: expected {words}, got {value}")
    for name, value in vars(args).items():  # of a count; beyond these torch and floats have none
        is_count = type(value) is int or name == "num_train_epochs"
        if is_count and not -MOST < value < MOST:
            raise InputError(f"--{name}: expected a number below 2**53, got {value}")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        got = args.num_train_epochs
        raise InputError(f"--num_train_epochs: expected a positive number, got {got}")
    for what in ("logging", "save", "eval"):
        steps = getattr(args, f"{what}_steps")
        if getattr(args, f"{what}_strategy") == "steps" and steps is not None and not steps > 0:
            raise InputError(f"--{what}_steps: expected a positive number, got {steps}")


def check_words(args: TrainingArguments) -> None:
    """Refuse words of fields that take something else too, which `check_values` leaves alone."""
    debug = args.debug.split() if isinstance(args.debug, str) else args.debug or []
    seen = [args.include_num_input_tokens_seen]
    for name, words, known in (
        ("debug", debug, [option.value for option in DebugOption]),
        ("include_num_input_tokens_seen", seen, ["all", "non_padding", "no", True, False]),
    ):
        for word in words:
            if word not in known:
                expected = " | ".join(map(in_yaml, known))
                raise InputError(f"--{name}: expected {expected}, got {in_yaml(word)}")
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if not isinstance(value, str) or (name in FILES and os.path.isfile(value)):
            continue
        try:
            is_mapping = isinstance(json.loads(value), dict)
        except ValueError:
            is_mapping = False
        if not is_mapping:
            or_file = ", or a file of one" if name in FILES else ""
            raise InputError(f"--{name}: expected a JSON object{or_file}, got {value}")


def warn(args: Config) -> None:
    """Say once what does nothing and what is slow here."""
    if not args.should_log:  # once, not once a rank
        return
    say_idle(idle_inherited(args))
    if args.bf16:
        warn_if_slow("--bf16", args.device, "leave it out, or say --bf16 auto")
    elif args.dtype == "bfloat16":
        warn_if_slow("--dtype bfloat16", args.device)


def _check_selection(args: Config) -> None:
    if args.method in ("sepo-rand", "sepo-entropy") and uses_mass(args):
        name = "select" if args.select == "mass" else "rejected_select"
        raise InputError(
            f"--{name}: expected fraction for {args.method}, which chooses without scores, got mass"
        )
    for name in ("fraction", "rejected_fraction", "mass"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            raise InputError(f"--{name}: expected a number in (0, 1], got {value}")


def _has_gpu(args: TrainingArguments) -> bool:
    return args.device.type != "cpu"
