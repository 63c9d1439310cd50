"""Every old name of a flag or value means what it meant, and says the new one once."""

import dataclasses

import pytest
import yaml

from sepo import SePOConfig
from sepo.commands.main import COMMANDS, make_parser
from sepo.flags.parser import Parser
from sepo.flags.renamed import NAMES, VALUES, say_renamed, takes_old_names, today
from sepo.flags.selection import selection_flags
from sepo.trainer.arguments import TrainParser, parse

# what SePOConfig had of its own before the first of its fields was renamed
BEFORE = """
method model_name_or_path reference_model_name_or_path dataset_name dataset_config dataset_split
eval_dataset_name eval_dataset_split max_length strict append_eos trust_remote_code dtype bf16
attn_impl fraction rejected_fraction mass first_token gamma margin beta gamma_beta_ratio
label_smoothing ipo_reduce penalty alpha sft_weight sft_reduce form mask independent_masks
mask_layernorm mask_learning_rate mask_weight_decay mask_l1 kl_mask_l1 mask_norm pairs_per_step
max_tokens_per_batch head_budget recompute fused_layers disable_dropout use_peft lora_r lora_alpha
lora_dropout lora_target_modules lora_modules_to_save load_in_4bit load_in_8bit learning_rate
num_train_epochs lr_scheduler_type warmup_steps logging_steps
""".split()
NEEDED = dict(model_name_or_path="M", dataset_name="D", output_dir="O", use_cpu=True)
WORDS = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O", "--use_cpu"]
CASES = [  # said before, said now, in flags; the rest of what is given
    ({"alpha": 0.25}, {"tdpo2_alpha": 0.25}, "--alpha is now --tdpo2_alpha"),
    ({"mask": "binary"}, {"mask_kind": "binary"}, "--mask is now --mask_kind"),
    ({"penalty": 7.0}, {"dpop_lambda": 7.0}, "--penalty is now --dpop_lambda"),
    (
        {"recompute": "cheap"},
        {"selective_checkpointing": True},
        "--recompute cheap is now --selective_checkpointing true",
    ),
    (
        {"recompute": "nothing"},
        {"selective_checkpointing": False},
        "--recompute nothing is now --selective_checkpointing false",
    ),
    (
        {"reference_model_name_or_path": "R"},
        {"reference": "R"},
        "--reference_model_name_or_path is now --reference",
    ),
    (
        {"first_token": "official"},
        {"first_token": "released"},
        "--first_token official is now --first_token released",
    ),
    ({"form": "code"}, {"form": "released"}, "--form code is now --form released"),
    ({"fraction": "mass"}, {"select": "mass"}, "--fraction mass is now --select mass"),
    (
        {"rejected_fraction": "mass"},
        {"rejected_select": "mass"},
        "--rejected_fraction mass is now --rejected_select mass",
    ),
]
ids = lambda case: " ".join(map(str, *case.items())) if isinstance(case, dict) else ""


def words(given: dict) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def settings(args: SePOConfig) -> dict:
    names = [field.name for field in dataclasses.fields(SePOConfig)]
    return {name: getattr(args, name) for name in names if name != "logging_dir"}


def test_the_table_is_whole():
    now = {field.name for field in dataclasses.fields(SePOConfig)}
    assert set(BEFORE) - now == NAMES.keys() - {"split"}  # which the other commands had
    assert not NAMES.keys() & now and {*NAMES.values()} <= now
    assert {name for name, _ in VALUES} | {name for name, _ in VALUES.values()} <= now
    tried = {(NAMES.get(n, n), v) for old, _, _ in CASES for n, v in old.items()}
    assert VALUES.keys() <= tried and NAMES.keys() - {"split"} <= {n for c in CASES for n in c[0]}


@pytest.mark.parametrize(("old", "new", "line"), CASES, ids=ids)
def test_three_ways_to_say_it(tmp_path, caplog, old, new, line):
    expected = settings(parse([*WORDS, *words(new)]))
    assert caplog.messages == []
    joined = [f"--{name}={value}" for name, value in old.items()]
    dashes = [word.replace("_", "-") if word[:2] == "--" else word for word in words(old)]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(NEEDED | old))
    for say in (
        lambda: parse([*WORDS, *words(old)]),
        lambda: parse([*WORDS, *joined]),
        lambda: parse([*WORDS, *dashes]),
        lambda: parse(["--config", str(tmp_path / "run.yaml")]),
        lambda: SePOConfig(**NEEDED, **old),
        lambda: dataclasses.replace(SePOConfig(**NEEDED), **old),
    ):
        caplog.clear()
        assert settings(say()) == expected
        assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("file", "argv", "expected"),
    [
        ("fraction: mass", "--fraction 0.5", (0.5, None)),
        ("fraction: mass", "--select fraction", (0.3, None)),
        ("fraction: mass", "--rejected_fraction 0.5", ("mass", 0.5)),
        ("fraction: mass\nrejected_fraction: 0.5", "", ("mass", 0.5)),
        ("select: mass", "--rejected_select fraction", ("mass", 0.3)),
        ("fraction: 0.4", "--rejected_fraction mass", (0.4, "mass")),
        ("fraction: 0.4", "--fraction mass", ("mass", None)),
        ("fraction: mass\nrejected_fraction: mass", "", ("mass", "mass")),
    ],
)
def test_the_command_line_wins_in_old_words_and_new(tmp_path, file, argv, expected):
    (tmp_path / "run.yaml").write_text(file)
    args = parse(["--config", str(tmp_path / "run.yaml"), *WORDS, *argv.split()])
    found = selection_flags(args)
    assert (found["fraction"], found["rejected_fraction"]) == expected


def test_other_flags_of_a_file_are_overridden_by_either_name(tmp_path):
    (tmp_path / "run.yaml").write_text("penalty: 3\nrecompute: cheap\nform: code\ntdpo2_alpha: 2\n")
    argv = ["--config", str(tmp_path / "run.yaml"), *WORDS, "--dpop_lambda", "4", "--alpha", "5"]
    args = parse([*argv, "--selective_checkpointing", "false", "--form", "paper"])
    assert (args.dpop_lambda, args.tdpo2_alpha) == (4, 5)
    assert (args.selective_checkpointing, args.form) == (False, "paper")


def test_old_names_are_attributes_too():
    """Of callbacks, and of a search that sets what it tries."""
    args = SePOConfig(**NEEDED, selective_checkpointing=True, dpop_lambda=2.0)
    assert (args.recompute, args.penalty, args.mask) == ("cheap", 2.0, "learned")
    args.recompute, args.penalty = "nothing", 3.0
    assert (args.selective_checkpointing, args.dpop_lambda) == (False, 3.0)
    assert not NAMES.keys() & vars(args).keys()


def test_a_line_a_machine_not_a_rank(monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    say_renamed(["--penalty is now --dpop_lambda"])
    assert caplog.messages == []


@pytest.mark.parametrize("command", ["score", "transfer", "inspect"])
def test_split_of_the_commands_that_read(command, caplog):
    need = {
        "score": "--dataset_name D --reference R --output_dir O",
        "transfer": "--scores S --oracle R --dataset_name D --model_name_or_path M --output_dir O",
        "inspect": "--dataset_name D",
    }[command]
    args = make_parser(command).parse_args([command, *need.split(), "--split", "test"])
    assert args.dataset_split == "test"
    assert caplog.messages == ["--split is now --dataset_split"]


def test_a_command_of_its_own_fraction_keeps_it(capsys):
    """--fraction of transfer never was mass."""
    parser = Parser()
    parser.add_argument("--fraction")
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args(["--strict", "--fraction", "mass"])
    assert (args.fraction, args.strict) == ("mass", True)


def test_what_follows_two_dashes_is_no_flag():
    parser = Parser()
    parser.add_argument("--dpop_lambda")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--", "--penalty", "3"]).rest == ["--penalty", "3"]


def test_no_command_shows_an_old_name():
    named = [name for name, _, _ in COMMANDS if name != "train"]
    commands = {name: make_parser(name)._subparsers._group_actions[0].choices for name in named}
    shown = {name: commands[name][name].format_help() for name in named}
    shown["train"] = TrainParser().format_help()
    for name, text in shown.items():
        flags = {word.split("=")[0].strip("[],") for word in text.split() if "--" in word}
        assert not flags & {f"--{old}" for old in NAMES}, name


def test_values_that_no_dictionary_can_hold():
    assert today({"form": ["code"], "gamma": {"a": 1}}) == (
        {"form": ["code"], "gamma": {"a": 1}},
        [],
    )


def test_a_dataclass_without_the_field_has_no_such_attribute():
    @takes_old_names
    @dataclasses.dataclass
    class Few:
        dpop_lambda: float = 1.0

    assert Few(penalty=2.0).penalty == 2.0 and not hasattr(Few(), "mask")
