"""Bad input: one line naming the file, row, field or flag; exit code 2; nothing half-written."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from processes import ENVIRONMENT, run
from tiny import random_scored_pairs, tiny_model, tiny_tokenizer
from training_run import make_run, write_store

from sepo.commands import main as cli
from sepo.errors import exit_with_one_line
from sepo.flags.selection import selection_flags

TEXT_ROW = dict(prompt="w3 w4", chosen="w5 w6", rejected="w7")
DATASETS = pytest.mark.skipif(find_spec("datasets") is None, reason="needs datasets")
ROLE = dict(prompt="user", chosen="assistant", rejected="assistant")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    make_run(path)
    return path


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command line; return its one line on stderr."""

    def refuse(*argv):
        with pytest.raises(SystemExit) as stop:
            exit_with_one_line(lambda: cli.run([str(a) for a in argv]))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        lines = [line for line in error.splitlines() if "sepo: error:" in line]
        assert len(lines) == 1 and "Traceback" not in error
        assert not (tmp_path / "out").exists(), "half-written"
        return lines[0]

    return refuse


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(home, tmp_path, *more):
    return ("train", "--config", home / "run.yaml", "--output_dir", tmp_path / "out", *more)


def test_unknown_key_in_the_yaml(home, tmp_path, refused):
    values = yaml.safe_load((home / "run.yaml").read_text())
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**values, "learning_rte": 1}))
    line = refused("train", "--config", tmp_path / "bad.yaml", "--output_dir", tmp_path / "out")
    assert "bad.yaml: unknown key learning_rte" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no_such_flag", "1"], "unknown argument --no_such_flag"),
        (["--fraction", "0"], "--fraction: expected a number in (0, 1], got 0.0"),
        (["--fraction", "1.1"], "--fraction: expected a number in (0, 1], got 1.1"),
        (["--fraction", "most"], "--fraction: invalid float value: 'most'"),
        (["--rejected_fraction", "0"], "--rejected_fraction: expected a number in (0, 1], got 0.0"),
        (["--select", "mass", "--mass", "0"], "--mass: expected a number in (0, 1], got 0.0"),
        (
            ["--method", "sepo-rand", "--rejected_select", "mass"],
            "--rejected_select: expected fraction for sepo-rand, which chooses without scores",
        ),
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--attn_impl", "fa9"], "--attn_impl"),
        (["--attn_impl", "varlen"], "varlen cannot run here: it needs a CUDA device"),
        (["--max_tokens_per_batch", "9"], "expected at most 9 tokens (--max_tokens_per_batch)"),
        (["--use_peft", "--lora_target_modules", "nose"], "nose"),
        (["--use_peft", "--lora_target_modules", "lm_head"], "adapter on the head"),
        (["--load_in_8bit"], "--load_in_8bit: expected --use_peft too"),
        (["--method", "sepoo"], "--method"),
        (["--dataset_name", "/nowhere/pairs.jsonl"], "/nowhere/pairs.jsonl"),
        (["--model_name_or_path", "/nowhere/model"], "/nowhere/model"),
        (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml"),
        (["--resume_from_checkpoint", "/nowhere/checkpoint-3"], "not a complete checkpoint"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's
def test_arguments(home, tmp_path, refused, more, message):
    assert message in refused(*train(home, tmp_path, *more))


def test_output_dir_in_use(home, tmp_path, refused):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").touch()
    line = refused(*train(home, tmp_path, "--output_dir", tmp_path / "used"))
    assert "--output_dir" in line and "not empty" in line and "--resume_from_checkpoint" in line
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["precious"]


def test_a_store_of_another_tokenizer(home, tmp_path, refused):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(offset=1).save_pretrained(tmp_path / "model")
    line = refused(*train(home, tmp_path, "--model_name_or_path", tmp_path / "model"))
    assert "store" in line and "tokenizer" in line


def test_a_store_with_nan_scores(home, tmp_path, refused):
    pairs = random_scored_pairs(3)
    score = pairs[1].chosen_score.copy()
    score[0] = np.nan
    pairs[1] = replace(pairs[1], chosen_score=score)
    write_store(tmp_path / "store", pairs)
    line = refused(*train(home, tmp_path, "--dataset_name", tmp_path / "store"))
    assert "pair 1: expected finite values in chosen_score" in line


def test_a_cached_reference_of_other_weights(home, tmp_path, refused):
    key = dict(reference="0" * 64, reference_dtype="float32")
    write_store(tmp_path / "store", random_scored_pairs(3), **key)
    line = refused(*train(home, tmp_path, "--method", "dpo", "--dataset_name", tmp_path / "store"))
    assert "expected the reference's weights" in line and "got 000000000000" in line


def test_a_model_that_cannot_be_served(home, tmp_path, refused):
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    tiny_model(rope_parameters=rope).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    line = refused(*train(home, tmp_path, "--model_name_or_path", tmp_path / "model"))
    assert "LlamaForCausalLM is not supported: its rotary embedding (dynamic)" in line


def test_sepo_on_pairs_without_scores(home, tmp_path, refused):
    data = write_rows(tmp_path / "pairs.jsonl", [TEXT_ROW])
    line = refused(*train(home, tmp_path, "--dataset_name", data))
    assert "pair 0: expected a score per chosen token (`sepo score` writes them)" in line


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "pairs.jsonl"),
        ([dict(prompt="w3", chosen="w4")], "rejected"),
        ([dict(TEXT_ROW, chosen=7)], "pair 0"),
        ([dict(TEXT_ROW, chosen=TEXT_ROW["rejected"])], "identical"),
        ([dict(TEXT_ROW, chosen="")], "empty"),
        ([dict(TEXT_ROW, prompt="w3 " * 2000)], "max_length"),
        (
            [{k: [dict(role=ROLE[k], content=v)] for k, v in TEXT_ROW.items()}],
            "chat template",
        ),
    ],
    ids=["empty", "column", "type", "identical", "no-response", "long-prompt", "no-template"],
)
@pytest.mark.parametrize("command", ["train", "score", "inspect"])
def test_data(home, tmp_path, refused, rows, message, command):
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    if command == "train":
        argv = train(home, tmp_path, "--method", "simpo", "--dataset_name", data)
    elif command == "score":
        models = ("--oracle", home / "model", "--reference", home / "model")
        argv = ("score", "--dataset_name", data, *models, "--output_dir", tmp_path / "out")
        argv += ("--max_length", 512)
    else:
        argv = (
            "inspect",
            "--dataset_name",
            data,
            "--model_name_or_path",
            home / "model",
            "--max_length",
            512,
        )
    assert message in refused(*argv)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "pairs.csv",
            "prompt,chosen,rejected\nw3,w4,é\n".encode("latin1"),
            "line 2: expected UTF-8",
        ),
        ("pairs.jsonl", b'{"prompt": "w3", "chosen": "w4", "rejected": "w5"}\nnull\n', "got null"),
        ("pairs.jsonl", b'{"prompt": "w3", "cho', "line 1: expected a JSON object on each line"),
        ("pairs.csv", b"prompt,chosen,rejected\nw3,w4\n", "line 2: expected 3 cells"),
        pytest.param("pairs.parquet", b"no parquet", "cannot read", marks=DATASETS),
    ],
)
@pytest.mark.parametrize("command", ["train", "score", "inspect", "transfer"])
def test_a_file_that_cannot_be_read(home, tmp_path, refused, name, content, message, command):
    (tmp_path / name).write_bytes(content)
    data, model, out = tmp_path / name, home / "model", ("--output_dir", tmp_path / "out")
    argv = {
        "train": train(home, tmp_path, "--method", "simpo", "--dataset_name", data),
        "score": ("score", "--dataset_name", data, "--oracle", model, "--reference", model, *out),
        "inspect": ("inspect", "--dataset_name", data, "--model_name_or_path", model),
        "transfer": ("transfer", "--scores", home / "store", "--oracle", model)
        + ("--dataset_name", data, "--model_name_or_path", model, *out),
    }[command]
    line = refused(*argv)
    assert message in line and name in line


@DATASETS
def test_the_name_of_a_kind_of_file_is_no_data(home, tmp_path, refused, monkeypatch):
    write_rows(tmp_path / "pairs.jsonl", [TEXT_ROW])
    monkeypatch.chdir(tmp_path)
    line = refused(*train(home, tmp_path, "--method", "simpo", "--dataset_name", "json"))
    assert "expected a file, a directory or a hub id, got json" in line


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_data_to_evaluate_on_in_a_single_file(home, tmp_path, refused, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", [TEXT_ROW])
    other = write_rows(tmp_path / "other.jsonl", [dict(TEXT_ROW, prompt="w8 w9")] * 2)
    argv = ("--method", "simpo", "--dataset_name", data, "--eval_dataset_name", other)
    cli.run([str(a) for a in train(home, tmp_path, *argv, "--eval_strategy", "epoch")])
    out = capsys.readouterr().out
    assert f"{other} (TRL" in out and "2 rows read" in out
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert any("eval_loss" in json.loads(line) for line in lines)
    # a split that is named is looked for
    pytest.importorskip("datasets")
    (tmp_path / "out").rename(tmp_path / "done")
    line = refused(*train(home, tmp_path, *argv, "--eval_dataset_split", "test"))
    assert 'Unknown split "test"' in line and "other.jsonl" in line


@pytest.mark.parametrize("argv", [[], ["fly"], ["score"], ["inspect", "x"]])
def test_usage(refused, argv):
    refused(*argv)


def test_command_line_wins_over_yaml(home):
    from sepo.train import parse

    argv = ["--config", str(home / "run.yaml"), "--output_dir", "x", "--learning_rate", "0.5"]
    args = parse([*argv, "--use_cpu"])
    assert (args.learning_rate, args.pairs_per_step, args.method) == (0.5, 4, "sepo")


def test_yaml_numbers_may_be_written_with_an_exponent(home, tmp_path):
    from sepo.train import parse

    (tmp_path / "run.yaml").write_text((home / "run.yaml").read_text() + "weight_decay: 5e-6\n")
    args = parse(["--config", str(tmp_path / "run.yaml"), "--output_dir", "x"])
    assert args.weight_decay == 5e-6


@pytest.mark.parametrize(
    ("values", "argv", "expected"),
    [
        (dict(fraction="mass", mass=0.7), [], ("mass", None, 0.7)),
        (dict(fraction=0.25, rejected_fraction="0.5"), [], (0.25, 0.5, 0.8)),
        (dict(fraction="mass"), ["--fraction", "0.2"], (0.2, None, 0.8)),
        ({}, ["--fraction", "1", "--rejected_fraction", "mass"], (1.0, "mass", 0.8)),
    ],
)
def test_a_fraction_is_a_number_or_mass(tmp_path, values, argv, expected):
    from sepo.train import parse

    names = ("model_name_or_path", "dataset_name", "output_dir")
    values |= dict.fromkeys(names, "x") | dict(use_cpu=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    args = parse(["--config", str(tmp_path / "run.yaml"), *argv])
    found = tuple(selection_flags(args).values())[:3]
    assert found == expected and [*map(type, found)] == [*map(type, expected)]


@pytest.mark.slow
def test_the_three_ways_to_start_are_one_program(home, tmp_path):
    for way in (["-m", "sepo.train"], ["-m", "sepo.commands.main", "train"]):
        out = tmp_path / way[1]
        run(*way, "--config", home / "run.yaml", "--output_dir", out, "--max_steps", 2)
    a, b = (tmp_path / n / "model.safetensors" for n in ("sepo.train", "sepo.commands.main"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("score", ["--device", "cuda"], "--device: expected a device that is here"),
        ("score", ["--oracle_device", "gpu"], "--oracle_device: expected a device that is here"),
        ("score", ["--reference_device", "meta"], "got meta (it holds no values)"),
        ("score", ["--pairs_per_part", "0"], "--pairs_per_part: expected a whole number of at le"),
        ("score", ["--limit", "x"], "--limit: expected a whole number of at least 1, got x"),
        ("score", ["--shard", "4/4"], "--shard: expected i/n, as in 0/4, got 4/4"),
        ("score", ["--output_dir", "FILE/below"], "expected a folder to write to, "),
        ("inspect", ["--rows", "-1"], "--rows: expected a whole number of at least 0, got -1"),
        ("inspect", ["--fraction", "nan"], "--fraction: expected a number in (0, 1], got nan"),
        ("inspect", ["--mass", "2"], "--mass: expected a number in (0, 1], got 2"),
        ("transfer", ["--fraction", "0"], "--fraction: expected a number in (0, 1], got 0"),
        ("report", ["--pairs", "-1"], "--pairs: expected a whole number of at least 0, got -1"),
        ("demo", ["--seed", "4294967296"], "--seed: expected a whole number from 0 to 4294967295"),
        ("demo", ["--per_opening", "0"], "--per_opening: expected a whole number of at least 1"),
    ],
)
def test_flags_of_the_other_commands(home, tmp_path, refused, command, words, message):
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("there is one")
    (tmp_path / "FILE").touch()
    model, out = str(home / "model"), str(tmp_path / "out")
    needed = {
        "score": ["--dataset_name", "D", "--reference", model, "--oracle", model],
        "inspect": ["--dataset_name", "D", "--model_name_or_path", model],
        "transfer": ["--scores", "S", "--oracle", model, "--dataset_name", "D"],
        "report": [str(home / "store")],
        "demo": [],
    }[command]
    if command in ("score", "transfer", "demo"):
        needed += ["--output_dir", out]
    if command == "transfer":
        needed += ["--model_name_or_path", model]
    words = [word.replace("FILE", str(tmp_path / "FILE")) for word in words]
    assert message in refused(command, *needed, *words)


@pytest.mark.parametrize("where", ["FILE", "FILE/below", "FILE/far/below", "/proc/sepo"])
def test_an_output_that_cannot_be_made(home, tmp_path, refused, where):
    (tmp_path / "FILE").write_text("precious")
    place = where.replace("FILE", str(tmp_path / "FILE"))
    line = refused(*train(home, tmp_path, "--output_dir", place))
    assert f"{place}: expected a folder to write to, got " in line
    assert (tmp_path / "FILE").read_text() == "precious"


def ended(*arguments, **environment) -> subprocess.CompletedProcess:
    """A process of its own, whatever it ends with."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=ENVIRONMENT | environment, capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SEPO_CPU", "AVX3", "SEPO_CPU: expected one of DEFAULT,"),
        ("RANK", "first", "RANK: expected a whole number, as torchrun sets it, got first"),
        ("LOCAL_RANK", "0x", "LOCAL_RANK: expected a whole number"),
    ],
)
@pytest.mark.parametrize("start", [["sepo.train"], ["sepo.commands.main", "score"]])
def test_a_wrong_environment_in_one_line(variable, value, message, start):
    done = ended("-m", *start, **{variable: value})
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and line.startswith(f"sepo: error: {message}")


def inspected(home, tmp_path, text="w5 w6") -> list:
    rows = [dict(TEXT_ROW, chosen=text, id=f"é{i}") for i in range(3000)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    return [
        "-m",
        "sepo.commands.main",
        "inspect",
        "--dataset_name",
        data,
        "--model_name_or_path",
        home / "model",
    ]


def test_a_reader_that_has_seen_enough(home, tmp_path):
    command = [*inspected(home, tmp_path), "--rows", "3000"]
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        first = process.stdout.readline().decode()
        process.stdout.close()
        error = process.stderr.read()
    assert first.startswith("pair é0: 1 prompt")
    assert (error, process.returncode) == (b"", 141)


def test_a_stdout_of_another_encoding_gets_escapes(home, tmp_path):
    done = ended(*inspected(home, tmp_path), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(rb"pair \xe90: 1 prompt")
    store = home / "store"
    report = ["report", store, "--model_name_or_path", home / "model", "--json"]
    done = ended("-m", "sepo.commands.main", *report, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    utf8 = ended("-m", "sepo.commands.main", *report, PYTHONIOENCODING="utf-8")
    assert json.loads(done.stdout) == json.loads(utf8.stdout)
