"""Bad inputs by table: every command, its flags with wrong values, YAML, outputs, environments."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import NoneType

from sepo.flags.values import kinds
from sepo.trainer.checks import NOT_NEGATIVE, POSITIVE, SEEDS
from sepo.trainer.config import CHOICES, SePOConfig
from sepo.trainer.inherited import FIELDS, Refused


@dataclass(frozen=True)
class Case:
    """One command line that can't be obeyed. HOME is a whole small run, TMP a folder of its own."""

    id: str
    argv: tuple[str, ...]
    prepare: Callable[[Path, Path], None] = lambda home, tmp: None  # writes what is bad below TMP
    environment: dict = field(default_factory=dict)
    process: bool = False  # of its own: it might take this one down


TRAIN = ("train", "--config", "HOME/run.yaml", "--output_dir", "TMP/out")
MODEL = "HOME/model"
COMMANDS = {  # each with all that it needs
    "train": TRAIN,
    "score": (
        *("score", "--dataset_name", "HOME/pairs.jsonl", "--reference", MODEL, "--oracle", MODEL),
        *("--output_dir", "TMP/out", "--device", "cpu"),
    ),
    "inspect": ("inspect", "--dataset_name", "HOME/pairs.jsonl", "--model_name_or_path", MODEL),
    "transfer": (
        *("transfer", "--scores", "HOME/store", "--oracle", MODEL, "--model_name_or_path", MODEL),
        *("--dataset_name", "HOME/pairs.jsonl", "--output_dir", "TMP/out"),
    ),
    "report": ("report", "HOME/store", "--model_name_or_path", MODEL, "-o", "TMP/out.html"),
    "demo": ("demo", "--output_dir", "TMP/out"),
}
READERS = {  # how each command is given the data, or a store, at DATA
    "train": (*TRAIN, "--method", "simpo", "--dataset_name", "DATA"),
    "score": (*COMMANDS["score"], "--dataset_name", "DATA"),
    "inspect": ("inspect", "--dataset_name", "DATA", "--model_name_or_path", MODEL),
}
STORES = {
    **READERS,
    "train": (*TRAIN, "--dataset_name", "DATA"),
    "report": ("report", "DATA", "--model_name_or_path", MODEL, "-o", "TMP/out.html"),
    "transfer": (*COMMANDS["transfer"], "--scores", "DATA"),
}


def cases() -> list[Case]:
    found = [
        *flags_of_train(),
        *flags_of_the_others(),
        *yaml_files(),
        *outputs(),
        *environments(),
    ]
    return [*{case.id: case for case in found}.values()]  # some values are in two tables


# Flags


def flags_of_train() -> Iterator[Case]:
    for flag, value in _values_of_train():
        yield Case(f"train --{flag}={value}", (*TRAIN, f"--{flag}={value}"))
    for words in (
        ("--no_such_flag", "1"), ("--use_cpu", "true", "left over"), ("--learning_rate",),
        ("--config",), ("--config", "HOME/nothing.yaml"), ("--config", "HOME"),
        ("--eval_strategy", "steps"), ("--eval_strategy", "epoch"), ("--eval_on_start",),
        ("--load_best_model_at_end",), ("--fp16",), ("--tf32", "true"), ("--load_in_4bit",),
        ("--load_in_8bit", "--use_peft"), ("--use_liger_kernel",), ("--fsdp",),
        ("--fp16", "--bf16"), ("--selective_checkpointing", "--gradient_checkpointing"),
        ("--recompute", "cheap", "--torch_compile"), ("--mask", "random", "--independent_masks"),
        ("--penalty",), ("--penalty=x",), ("--recompute", "much"), ("--first_token", "officials"),
        ("--method", "sepo-rand", "--fraction", "mass"), ("--method", "sepo-rand", "--select", "mass"),
        ("--max_tokens_per_batch", "9"),
        ("--use_peft", "--lora_target_modules", "nose"), ("--num_train_epochs=-1",),
        ("--use_peft", "--lora_target_modules", "lm_head"), ("--attn_impl", "varlen"),
        ("--lr_scheduler_type", "reduce_lr_on_plateau"), ("--lr_scheduler_type", "greedy"),
        ("--lr_scheduler_type", "cosine_with_min_lr"), ("--warmup_steps=-0.5",),
        ("--lr_scheduler_type", "cosine_warmup_with_min_lr"),
        ("--lr_scheduler_kwargs", '{"speed": 1}'), ("--optim", "sgd", "--optim_args", "momentum"),
        ("--optim", "sgd", "--optim_args", "momentum=fast"), ("--save_strategy", "best"),
        ("--torch_compile_backend", "gcc"), ("--torch_compile_mode", "quick"),
        ("--resume_from_checkpoint", "HOME/nothing"), ("--resume_from_checkpoint", "HOME/store"),
        ("--resume_from_checkpoint", "yes"), ("--dataset_name", "HOME/nothing.jsonl"),
        ("--dataset_name", "HOME/run.yaml"), ("--model_name_or_path", "HOME/nothing"),
        ("--model_name_or_path", "HOME/store"), ("--model_name_or_path", "HOME/run.yaml"),
        ("--eval_dataset_name", "HOME/nothing"), ("--push_to_hub",),
        ("--method", "dpo", "--reference", "HOME/nothing",
         "--dataset_name", "HOME/pairs.jsonl"),
        ("--method", "sparsepo", "--reference_model_name_or_path", "HOME/nothing"),
        ("--report_to", "none", "nonsense"), ("--optim", "galore_adamw"),
        ("--optim", "galore_adamw", "--optim_target_modules", "q_proj"),
    ):  # fmt: skip
        yield Case(f"train {' '.join(words)}", (*TRAIN, *words))
    for tracker in ("wandb", "mlflow", "comet_ml", "clearml", "trackio", "swanlab", "flyte", "x"):
        yield Case(f"train --report_to {tracker}", (*TRAIN, "--report_to", tracker))
    for optimizer in (
        "adamw_8bit", "adamw_torch_8bit", "adamw_anyprecision", "ademamix", "lion_32bit",
        "grokadamw", "schedule_free_adamw", "stable_adamw", "rmsprop_bnb", "adamw_torch_xla",
    ):  # fmt: skip
        yield Case(f"train --optim {optimizer}", (*TRAIN, "--optim", optimizer))
    needed = ("--model_name_or_path", MODEL, "--dataset_name", "HOME/store", "--output_dir", "O")
    for i in range(0, len(needed), 2):
        rest = needed[:i] + needed[i + 2 :]
        yield Case(f"train without {needed[i]}", ("train", "--use_cpu", *rest))


def _values_of_train() -> Iterator[tuple[str, str]]:
    for flag, takes in kinds(SePOConfig).items():
        verdict, of = FIELDS.get(flag), takes - {NoneType}
        if isinstance(verdict, Refused):
            yield from ((flag, value) for value in verdict.values or _not_default(flag, of))
        elif flag in CHOICES or any(issubclass(kind, Enum) for kind in of):
            yield from ((flag, value) for value in ("neither", "7x"))
        elif of == {int}:
            yield from ((flag, value) for value in ("x", "1.5", "1e400"))
        elif of == {float}:
            yield from ((flag, value) for value in ("x", "nan", "-inf"))
        elif of == {bool}:
            yield flag, "maybe"
        elif dict in of:
            yield from ((flag, value) for value in ("nothing", "{", "[1]"))
    for names, values in (
        (POSITIVE, ("0", "-3")),
        (NOT_NEGATIVE, ("-1",)),
        (SEEDS, ("-1", "4294967296", "99999999999999999999")),
        (("fraction", "rejected_fraction", "mass"), ("0", "-0.1", "1.01", "nan")),
        (("lora_dropout", "adam_beta1", "adam_beta2"), ("1", "-0.1")),
        (("label_smoothing",), ("0.5", "-0.1")),
        (("max_steps",), ("-2",)),
        (("num_train_epochs", "logging_steps", "save_steps"), ("0", "-2")),
        (("logging_steps", "save_steps"), ("1.5",)),
        (("bf16",), ("perhaps", "2")),
        (("debug", "include_num_input_tokens_seen", "log_level", "log_level_replica"), ("x",)),
    ):
        yield from ((name, value) for name in names for value in values)


def _not_default(flag: str, of: set[type]) -> list[str]:
    if flag == "parallelism_config":
        return []
    values = {"train_sampling_strategy": "sequential", "dataloader_multiprocessing_context": "fork"}
    if of == {bool}:
        return ["false" if SePOConfig.__dataclass_fields__[flag].default else "true"]
    if dict in of:
        return ['{"split_batches": true}']
    return [values.get(flag, "3")]


def flags_of_the_others() -> Iterator[Case]:
    count = ("x", "1.5", "0", "-1", "")
    for command, flags in {
        "score": {
            "limit": count, "max_length": (*count, "1"), "max_tokens_per_batch": count,
            "pairs_per_part": count, "precision_check": ("x", "-1", "0.5"),
            "shard": ("1", "x/y", "4/4", "-1/4", "0/0", "1/2/3", ""), "keep": ("score", "x"),
            "device": ("cuda:99", "gpu", "meta", "cpu:x", ""), "oracle_device": ("nothing", "meta"),
            "reference_device": ("nothing", "meta"), "dtype": ("float8", "x"),
            "arithmetic": ("float8", "x"), "oracle_arithmetic": ("auto",),
            "oracle_dtype": ("int8",), "reference_dtype": ("double",), "append_eos": ("maybe",),
            "oracle": ("HOME/nothing", "HOME/store"), "reference": ("HOME/nothing", "HOME/store"),
            "dataset_name": ("HOME/nothing.jsonl", "HOME/run.yaml"),
        },
        "inspect": {
            "rows": ("x", "-1", "0.5"), "fraction": ("x", "0", "1.1", "nan", "-1", ""),
            "rejected_fraction": ("x", "0", "2"), "mass": ("x", "0", "1.5", "nan"),
            "first_token": ("last",), "select": ("x",), "rejected_select": ("x",), "max_length": (*count, "1"), "limit": count,
            "append_eos": ("maybe",), "prompt_key": ("nothing",), "chosen_key": ("nothing",),
            "rejected_key": ("nothing",), "model_name_or_path": ("HOME/nothing", "HOME/store"),
        },
        "transfer": {
            "limit": count, "max_length": count, "pairs_per_part": count,
            "fraction": ("x", "0", "1.5", "nan", "0.5"), "mode": ("x",), "aggregate": ("min",),
            "append_eos": ("maybe",), "scores": ("HOME/nothing", "HOME/model", "HOME/run.yaml"),
            "oracle": ("HOME/nothing",), "model_name_or_path": ("HOME/nothing",),
            "dataset_name": ("HOME/nothing.jsonl", "HOME/store"),
        },
        "report": {
            "pairs": ("x", "-1", "0.5"), "format": ("pdf",), "run": ("HOME/nothing", "HOME/store"),
            "output": ("HOME", "HOME/run.yaml/below"), "model_name_or_path": ("HOME/nothing",),
        },
        "demo": {
            "oracle_pairs": count, "per_opening": count, "seed": ("x", "-1", "4294967296"),
            "data": ("HOME/nothing", "HOME/run.yaml"),
        },
    }.items():  # fmt: skip
        for flag, values in flags.items():
            for value in values:
                given = f"--{flag}={value}"
                argv = COMMANDS[command]
                if command == "report" and flag == "model_name_or_path":
                    argv = ("report", "HOME/store", "-o", "TMP/out.html")
                yield Case(f"{command} {given}", (*argv, given))
    for command in COMMANDS:
        yield Case(f"{command} --no_such_flag", (*COMMANDS[command], "--no_such_flag"))
    for argv in (
        (), ("fly",), ("score",), ("inspect",), ("transfer",), ("report",), ("inspect", "x"),
        ("inspect", "--verify"), ("inspect", "x", "--verify"), ("inspect", "--verify", "HOME"),
        (*COMMANDS["report"], "--output_dir", "TMP"),
        ("score", "--reference", MODEL, "--dataset_name", "HOME/pairs.jsonl", "--output_dir", "O"),
        ("report", "HOME/nothing"), ("report", "HOME/store", "HOME/store", "HOME/store"),
        ("env", "more"), ("inspect", "HOME/pairs.jsonl", "more", "--model_name_or_path", MODEL),
        (*COMMANDS["report"], "--json", "--format", "png"),
        (*COMMANDS["report"], "--model_name_or_path", "a", "--model_name_or_path", "b"),
    ):  # fmt: skip
        yield Case(f"sepo {' '.join(argv)}", argv)


def yaml_files() -> Iterator[Case]:
    for text in (
        "", "a", "[]", "7", "null", "{", "a: [", "a: b: c", "\t", "- a\n- b", "--- {}\n--- {}",
        "learning_rte: 1", "config: x", "help: true", "1: 2", "[a]: 1", "null: 1", "true: 1",
        "learning_rate: null", "learning_rate: [1]", "learning_rate: {a: 1}", "learning_rate: no",
        "learning_rate:", "learning_rate: .nan", "learning_rate: nan", "seed: 1.0", "seed: yes",
        "seed: -1", "seed: 1e3", "max_steps: ten", "max_steps: null", "pairs_per_step: 2.5",
        "pairs_per_step: [4]", "use_cpu: maybe", "use_cpu: null", "use_cpu: [true]", "use_cpu: 2",
        "append_eos: 7", "method: null", "method: [sepo]", "method: yes", "method: {sepo: 1}",
        "save_strategy: maybe", "save_strategy: null", "save_strategy: true", "eval_strategy: yes",
        "logging_strategy: [no]", "lr_scheduler_type: null", "optim: 3", "optim: null",
        "lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: 3", "lr_scheduler_kwargs: {a: 1}",
        "report_to: [wandb]", "report_to: {a: b}", "report_to: [[none]]",
        "lora_target_modules: [[a]]", "lora_target_modules: {a: 1}", "fraction: [0.3]",
        "fraction: yes", "fraction: null", "mass: null", "gamma: '2,5'", "margin: 1/2",
        "dataset_name: [a]", "model_name_or_path: {a: b}", "output_dir: [x]", "seed: 1\nseed: 2",
        "a: !!python/object/apply:os.system [x]", "seed: !!python/name:os.system",
        "<<: 3", "<<: [1]", "seed: *nowhere", "x: &x [*x]", "seed: !!binary aGk=",
        "neftune_noise_alpha: 5", "label_smoothing_factor: 0.1", "group_by_length: true",
        "per_device_train_batch_size: 4", "gradient_accumulation_steps: 2", "fp16: true",
        "accelerator_config: {split_batches: true}", "parallelism_config: {tp_size: 2}",
        "liger_kernel_config: [a]", "deepspeed: {}\nfp16: 1", "warmup_ratio: 0.1",
    ):  # fmt: skip
        text_of = lambda tmp, text=text: (tmp / "run.yaml").write_text(text)
        yield _yaml(repr(text), lambda home, tmp, write=text_of: write(tmp))
    for name, content in (
        ("binary", b"\x00\x01\x02"), ("latin-1", "run_name: é".encode("latin-1")),
        ("half of UTF-16", b"\xff\xfea"), ("escape", b"run_name: \x1b[2J"),
        ("a hundred thousand brackets", b"a: " + b"[" * 100_000),
    ):  # fmt: skip
        write = lambda home, tmp, content=content: (tmp / "run.yaml").write_bytes(content)
        yield _yaml(name, write)


def _yaml(name: str, write: Callable) -> Case:
    needed = ("--model_name_or_path", MODEL, "--dataset_name", "HOME/store", "--output_dir")
    argv = ("train", "--config", "TMP/run.yaml", *needed, "TMP/out")
    return Case(f"yaml {name}", argv, write)


def outputs() -> Iterator[Case]:
    for command, flag in dict.fromkeys(COMMANDS, "--output_dir").items():
        flag = "--output" if command == "report" else flag
        if command == "inspect":
            continue
        for place in ("FILE", "FILE/below", "FILE/far/below", "/proc/sepo"):
            if command == "report" and place == "FILE":
                continue  # which it may overwrite
            argv = (*COMMANDS[command], flag, place.replace("FILE", "TMP/file"))
            write = lambda home, tmp: (tmp / "file").write_text("precious")
            yield Case(f"{command} {flag} {place}", argv, write)
    used = lambda home, tmp: _write(tmp / "out" / "precious", "")
    for command in ("train", "transfer", "demo"):
        yield Case(f"{command} into a folder in use", COMMANDS[command], used)


def environments() -> Iterator[Case]:
    for name, value, command in (
        ("RANK", "first", "train"), ("WORLD_SIZE", "two", "score"), ("LOCAL_RANK", "1.5", "train"),
        ("LOCAL_WORLD_SIZE", " ", "score"), ("SEPO_CPU", "AVX3", "train"), ("SEPO_CPU", "", "demo"),
    ):  # fmt: skip
        setting = {name: value}
        yield Case(
            f"{name}={value} {command}", COMMANDS[command], environment=setting, process=True
        )
    yield Case("RANK=4 WORLD_SIZE=2 score", COMMANDS["score"],
               environment={"RANK": "4", "WORLD_SIZE": "2"}, process=True)  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
