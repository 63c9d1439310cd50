"""`sepo report` as it is called: what it writes, and one line for what it refuses."""

import json

import numpy as np
import pytest
from reports import scored, write_metrics, write_store
from tokenizers_for_tests import chatml_tokenizer, plain_tokenizer

from sepo import cli
from sepo.errors import exit_with_one_line


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A store whose manifest names its tokenizer, a run, and another tokenizer."""
    monkeypatch.chdir(tmp_path)
    chatml_tokenizer().save_pretrained("oracle")
    plain_tokenizer().save_pretrained("other")
    pairs = [scored(str(i), seed=i) for i in range(3)]
    write_store(tmp_path / "store", pairs, tokenizer_name="oracle")
    write_metrics(tmp_path / "run", *(f'{{"step": {i}, "loss": {i}}}' for i in (1, 2, 3)))
    return tmp_path


def run(*argv):
    cli.run(["report", *map(str, argv)])


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        exit_with_one_line(lambda: run(*argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


def test_html_is_the_default(home, capsys):
    run("store", "--run", "run")
    page = (home / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "Choosing k" in page and "Training" in page
    assert capsys.readouterr().out.startswith("report.html: 0.")


def test_json_goes_to_stdout_or_to_a_file(home, capsys):
    run("store", "--json", "--pairs", 1)
    printed = json.loads(capsys.readouterr().out)
    run("store", "--json", "--pairs", 1, "-o", "out.json")
    assert json.loads((home / "out.json").read_text()) == printed
    assert [pair["id"] for pair in printed["pairs"]] == ["0"]
    assert not (home / "report.html").exists()


def test_png_is_a_file_a_figure(home):
    from matplotlib.image import imread

    run("store", "store", "--run", "run", "--format", "png", "-o", "figures")
    kinds = ("lengths", "accumulation", "distribution", "places")
    names = {f"{kind}-{i}.png" for kind in kinds for i in (0, 1)} | {"run-0.png"}
    assert {file.name for file in (home / "figures").iterdir()} == names
    for name in names:
        image = imread(home / "figures" / name)
        assert image.shape[:2] == (900, 1320) and np.std(image[..., :3]) > 0.02


def test_what_is_refused(home, capsys):
    write_store(home / "logp", [bare()], keep=["logp"], tokenizer_name="oracle")
    write_store(home / "nameless", [scored()])
    for argv, line in (
        ([], "expected a scored store or a run to report, got neither"),
        (["nowhere"], "nowhere: expected a scored store, found no manifest.json"),
        (["store"] * 3, "expected at most 2 stores, got 3"),
        (["logp"], "logp: expected a store with scores or weights, got one that keeps logp"),
        (["nameless"], "nameless: doesn't say whose tokenizer made it"),
        (["store", "--model_name_or_path", "other"], "store: scored with tokenizer oracle"),
        (["store", "--model_name_or_path", "run"], "can't load a tokenizer from run"),
        (["store", *["--model_name_or_path", "oracle"] * 2], "expected one name, or one a store"),
        (["store", "--run", "store"], "store: expected the folder of a training run"),
        (["store", "--pairs", "-1"], "--pairs: expected a whole number of at least 0, got -1"),
        (["store", "-o", "run"], "run: expected a file to write, got a folder"),
        (["store", "--format", "png", "-o", "run/metrics.jsonl"], "found a file"),
        (["store", "--format", "svg"], "invalid choice: 'svg'"),
    ):
        assert line in refused(capsys, *argv)
    assert not (home / "report.html").exists() and not (home / "report").exists()


def bare():
    scores = dict(chosen_score=None, rejected_score=None)
    logp = np.zeros(len(scored().chosen), np.float32)
    return scored(**scores, chosen_ref_logp=logp)
