"""`sepo score`: flags, the models that it loads, and those that it need not load."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import cut_short
from scoring_for_tests import QUIET, REFERENCE, make_pairs, make_tokenizer, parts, save_models

from sepo.commands import score as score_command
from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.flags.parser import Parser
from sepo.model import sharing
from sepo.model.load import load_model, load_tokenizer
from sepo.score.score import score_dataset, score_pairs, shard_name
from sepo.system.lock import lock


def parse(*words):
    parser = Parser()
    score_command.add_arguments(parser)
    return parser.parse_args(words)


def test_command_line(tmp_path, capsys):
    reference, oracle = save_models(tmp_path)
    rows = [
        {"prompt_ids": p.prompt.tolist(), "chosen_ids": p.chosen.tolist(), "id": p.id}
        | {"rejected_ids": p.rejected.tolist()}
        for p in make_pairs()
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ("--dataset_name", str(data), "--reference", reference, "--output_dir", str(out))
    args = parse(
        *flags,
        *("--oracle", oracle, "--keep", "logp", "hidden", "--device", "cpu", "--limit", "4"),
        *("--arithmetic", "bfloat16", "--oracle_arithmetic", "float32", "--precision_check", "2"),
    )
    score_command.run(args)
    printed = capsys.readouterr().out
    assert "4 rows read" in printed and f"complete store: {out}" in printed
    store = ScoredStore.open(out, tokenizer=load_tokenizer(reference))
    assert store.manifest["reading"]["kept"] == 4
    assert store.manifest["oracle_dtype"] == "float32"
    assert store.manifest["reference_dtype"] == "bfloat16"
    assert store.manifest["precision_check"]["pairs"] == 2
    expected = score_pairs(
        make_pairs()[:4], load_model(reference, dtype=torch.bfloat16), load_model(oracle)
    )
    np.testing.assert_allclose(store[3].chosen_score, expected[3].chosen_score, atol=1e-2)
    assert store[3].chosen_ref_logp is not None and store.manifest["hidden_width"] == 32
    assert parse(*flags, "--keep", "hidden", "--keep", "logp").keep == ["hidden", "logp"]
    assert parse(*flags).keep == []


def test_command_line_refuses_two_tokenizers(tmp_path):
    reference, oracle = save_models(tmp_path)
    make_tokenizer(1).save_pretrained(oracle)
    args = parse(
        *("--dataset_name", "unread", "--output_dir", str(tmp_path / "out")),
        *("--reference", reference, "--oracle", oracle),
    )
    with pytest.raises(InputError, match="oracle .* and reference .* have different tokenizers"):
        score_command.run(args)


def test_a_store_of_the_reference_spares_its_pass(tmp_path, capsys, monkeypatch):
    reference, oracle = save_models(tmp_path)
    cached, whole = tmp_path / "cached", tmp_path / "whole"
    models = dict(reference=load_model(reference), oracle=load_model(oracle))
    score_dataset(make_pairs(), cached, reference=models["reference"], keep=("logp",), **QUIET)
    score_dataset(make_pairs(), whole, **models, **QUIET)
    loaded = []
    load = lambda folder, **how: loaded.append(folder.path) or load_model(folder, **how)
    monkeypatch.setattr(sharing, "load_model", load)

    def run(out, *words, dataset=cached, model=reference):
        flags = ("--dataset_name", str(dataset), "--reference", model, "--oracle", oracle)
        args = parse(*flags, "--output_dir", str(tmp_path / out), "--pairs_per_part", "2", *words)
        score_command.run(args)
        return tmp_path / out

    assert parts(run("one")) == parts(whole)
    assert loaded == [oracle] and "reference: not run" in capsys.readouterr().out
    # what it does not keep, or keeps of a lower precision than is wanted, or of another model
    run("states", "--keep", "hidden")
    assert loaded == [oracle, reference, oracle]
    assert parts(run("of scores", dataset=whole)) == parts(whole)
    assert loaded[3:] == [reference, oracle]
    with pytest.raises(InputError, match="expected the reference's weights .*log-probabilities"):
        run("other", model=oracle)
    for flag in ("limit", "max_length"):
        with pytest.raises(InputError, match=f"--{flag}: .* is a scored store, whose pairs are"):
            run("some", f"--{flag}", "4")


def test_a_kept_reference_beside_an_oracle_of_lower_precision(tmp_path, capsys):
    reference, oracle = save_models(tmp_path)
    model = load_model(reference)
    score_dataset(make_pairs(), tmp_path / "cached", reference=model, keep=("logp",), **QUIET)
    flags = ("--dataset_name", str(tmp_path / "cached"), "--output_dir", str(tmp_path / "out"))
    score_command.run(
        parse(
            *flags, "--reference", reference, "--oracle", oracle, "--oracle_arithmetic", "bfloat16"
        )
    )
    assert "precision check, oracle bfloat16 against float32" in capsys.readouterr().out
    found = ScoredStore.open(tmp_path / "out").manifest
    assert (found["reference_dtype"], found["oracle_dtype"]) == ("float32", "bfloat16")
    exact = score_pairs(make_pairs(), model, load_model(oracle))
    pairs = ScoredStore.open(tmp_path / "out").pairs()
    errors = [
        np.abs(a.chosen_score - b.chosen_score).max() for a, b in zip(pairs, exact, strict=True)
    ]
    assert 1e-4 < max(errors) <= found["precision_check"]["error_max"] + 1e-6


@pytest.mark.parametrize("role", ["", "oracle_", "reference_"])
def test_old_names_of_the_arithmetic(role, caplog):
    flags = ("--dataset_name", "d", "--reference", "r", "--output_dir", "o")
    for words, lines in (
        ((f"--{role}dtype", "bfloat16"), [f"--{role}dtype is now --{role}arithmetic"]),
        ((f"--{role}arithmetic", "bfloat16"), []),
    ):
        caplog.clear()
        assert vars(parse(*flags, *words))[f"{role}arithmetic"] == "bfloat16"
        assert caplog.messages == lines


@pytest.mark.parametrize("name", ["split", "auto"])
def test_an_arithmetic_of_halves(tmp_path, job, capsys, name):
    """On this CPU or another; the manifest says what was taken."""
    score_command.run(parse(*job(tmp_path / "out"), "--arithmetic", name))
    manifest, printed = ScoredStore.open(tmp_path / "out").manifest, capsys.readouterr().out
    taken = manifest.get("oracle_arithmetic", "float32")
    assert manifest["oracle_dtype"] == manifest["reference_dtype"] == "float32"
    if name == "split":
        assert taken == "split" and "reference split and oracle split against" in printed
    else:
        assert f"arithmetic: {taken}; {manifest['arithmetic_reason']}" in printed
    with pytest.raises(InputError, match="tf32x3: expected a device that has its products, got"):
        score_command.run(parse(*job(tmp_path / "other"), "--arithmetic", "tf32x3"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shard", "1"), "expected i/n, as in 0/4, got 1"),
        (("--append_eos", "maybe"), "got maybe but expected one of"),
        (("--arithmetic", "int8"), "invalid choice: 'int8'"),
        (("--oracle_arithmetic", "auto"), "invalid choice: 'auto'"),
        (("--dtype", "split"), "invalid choice: 'split'"),
    ],
)
def test_command_line_refusals(words, message):
    with pytest.raises(InputError) as caught:
        parse("--dataset_name", "d", "--reference", "r", "--output_dir", "o", *words)
    assert message in str(caught.value)


@pytest.fixture
def job(tmp_path):
    """A store's flags, and what `score_dataset` makes of them."""
    reference, oracle = save_models(tmp_path)
    rows = [
        {f"{name}_ids": getattr(p, name).tolist() for name in ("prompt", "chosen", "rejected")}
        | {"id": p.id}
        for p in make_pairs(4)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--dataset_name", str(tmp_path / "data.jsonl"), "--pairs_per_part", "2"]
    flags += ["--reference", reference, "--oracle", oracle, "--device", "cpu"]
    return lambda output: [*flags, "--output_dir", str(output)]


def test_an_output_that_can_not_be(tmp_path, job, monkeypatch):
    """Refused before the models are loaded."""
    monkeypatch.setattr(score_command, "load_tokenizer", None)
    (tmp_path / "file").write_text("")
    for output, found in (
        (tmp_path / "file", "got a file"),
        (tmp_path / "file" / "below", "file, a file"),
        (tmp_path / "file" / "far" / "below", "file, a file"),
        (Path("/proc/sepo"), "No such file or directory"),  # root neither can make it
    ):
        with pytest.raises(InputError, match=f"{output}: expected a folder to write to, .*{found}"):
            score_command.run(parse(*job(output)))
    assert not list(tmp_path.glob("**/.*"))


def test_a_shard_that_another_process_scores(tmp_path, job, monkeypatch):
    """The second is refused before the models are loaded; another shard is not."""
    monkeypatch.setattr(score_command, "load_tokenizer", None)
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as other, lock(out, shard_name((1, 2))):
        score = lambda shard: other.submit(
            score_command.run, parse(*job(out), "--shard", shard)
        ).result()
        with pytest.raises(InputError, match=f"{out} is being written to by process"):
            score("1/2")
        with pytest.raises(TypeError, match="not callable"):  # it got to the tokenizer
            score("0/2")
        with pytest.raises(InputError, match=f"{out} is being written to by process"):
            arguments = dict(reference=REFERENCE, shard=(1, 2), keep=("logp",), **QUIET)
            other.submit(score_dataset, make_pairs(), out, **arguments).result()
    assert not out.exists()


@pytest.mark.parametrize(
    ("variable", "text"), [("RANK", "one"), ("WORLD_SIZE", ""), ("RANK", "1.0")]
)
def test_a_shard_that_is_no_number(tmp_path, job, monkeypatch, variable, text):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv(variable, text)
    with pytest.raises(InputError, match=f"{variable}: expected a number, got '{text}'"):
        score_command.run(parse(*job(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "file"), [(100, "manifest.json"), (2000, "part-00000-of-00002")])
def test_a_full_disk(tmp_path, job, size, file):
    """One line, no half of a file; what is there is gone on with when there is room."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    error = cut_short(size, "score", *job(out), at="sepo.commands.score.score_dataset")
    assert re.search(f"{out}/{file}.*: can't be written: .*File too large", error), error
    if size == 100:  # found out before anything was scored
        assert not out.exists()
    else:
        assert [path.name for path in out.iterdir()] == ["manifest.json"]
    for path in (out, whole):
        score_command.run(parse(*job(path)))
    assert parts(out) == parts(whole)
