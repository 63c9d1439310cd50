"""`sepo report` as it is called: what it writes, and one line for what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import cut_short
from reports import scored, write_metrics, write_store
from tokenizers_for_tests import chatml_tokenizer, plain_tokenizer

from sepo.commands import main as cli
from sepo.errors import exit_with_one_line
from sepo.system.lock import lock


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
        (["store", "--format", "png", "-o", "run/metrics.jsonl"], "got a file"),
        (["store", "--format", "svg"], "invalid choice: 'svg'"),
    ):
        assert line in refused(capsys, *argv)
    assert not (home / "report.html").exists() and not (home / "report").exists()


def bare():
    scores = dict(chosen_score=None, rejected_score=None)
    logp = np.zeros(len(scored().chosen), np.float32)
    return scored(**scores, chosen_ref_logp=logp)


def test_what_can_not_be_written(home, capsys, monkeypatch):
    """Refused before anything is read."""
    monkeypatch.setattr("sepo.commands.report.collect", None)
    (home / "file").write_text("")
    sealed = Path("/proc/sepo")  # where nobody can make a folder, root neither
    for argv, line in (
        (["-o", "file/report.html"], "file: expected a folder to write to"),
        (["-o", "file/deeper/report.html"], "file/deeper: expected a folder to write to"),
        (["--format", "png", "-o", "file"], "file: expected a folder to write to, got a file"),
        (["--format", "png", "-o", "file/figures"], "file/figures: expected a folder to write to"),
        (["-o", sealed / "report.html"], f"{sealed}: expected a folder to write to"),
        (["--json", "-o", sealed / "report.json"], f"{sealed}: expected a folder to write to"),
    ):
        assert line in refused(capsys, "store", *argv)
    assert not list(home.glob(".*"))


@pytest.mark.parametrize("form", ["html", "json", "png"])
def test_a_full_disk(home, form):
    """One line, no half of a file, and what was there before is there still."""
    (home / "out").mkdir()
    (home / "out" / "report.html").write_text("before")
    output = "out" if form == "png" else "out/report.html"
    error = cut_short(
        20_000 if form == "png" else 2000, "report", "store", "--format", form, "-o", output
    )
    assert "can't be written: File too large" in error
    left = {file.name for file in (home / "out").iterdir()}
    assert left == {"report.html"} and (home / "out/report.html").read_text() == "before"


def test_leftovers_of_killed_reports(home):
    """Their temporary files and locks go, other people's hidden files stay."""
    for name in (".report.html.4242.tmp", ".report.html.sepo-report-1.tmp"):
        (home / name).mkdir()
        (home / name / "report.html").write_text("half a page")
    (home / ".sepo-report-1.lock").write_text("")
    (home / ".sepo-report-2.lock").write_text("")
    for name in (".report.lock", ".other.html.4242.tmp", ".editor.tmp"):
        (home / name).write_text("")
    run("store")
    assert sorted(file.name for file in home.glob(".*")) == [
        ".editor.tmp", ".other.html.4242.tmp", ".report.lock",
    ]  # fmt: skip


def test_what_a_living_report_writes_stays(home):
    with lock(home, "sepo-report-1"), ThreadPoolExecutor(1) as other:
        (home / ".report.html.sepo-report-1.tmp").mkdir()
        other.submit(run, "store").result()
        assert (home / ".report.html.sepo-report-1.tmp").is_dir()
        assert (home / ".sepo-report-1.lock").is_file()


def test_numbers_that_no_chart_has_room_for(home):
    """NaN, infinities, a number above float64, a difference of numbers above it, the smallest."""
    values = ("Infinity", "-Infinity", "NaN", "1e999", "1" + "0" * 400, "1e308", "-1.7e308", "1.5")
    lines = [
        f'{{"step": {i}, "loss": {v}, "grad_norm": {5e-324 * (i % 2)}, "kl": {1e299 * (-1) ** i}}}'
        for i, v in enumerate(values)
    ]
    write_metrics(home / "wild", *lines)
    run("--run", "wild")
    assert "Loss" in (home / "report.html").read_text()
    assert "NaN" not in (home / "report.html").read_text().split("<script")[0]
    run("--run", "wild", "--json", "-o", "wild.json")
    metrics = json.loads((home / "wild.json").read_text())["runs"][0]["metrics"]
    assert metrics["loss"]["value"] == [None] * 7 + [1.5]
    assert metrics["grad_norm"]["value"][:2] == [0, 5e-324]
    run("--run", "wild", "--format", "png", "-o", "figures")


@pytest.mark.parametrize("step", ["Infinity", "1e400", "NaN", "-1", "1" + "0" * 400, "null", "[1]"])
def test_steps_that_are_none(home, capsys, step):
    write_metrics(home / "wild", f'{{"step": {step}, "loss": 1}}')
    line = "wild/metrics.jsonl, line 1: expected a JSON object with a step, got"
    assert line in refused(capsys, "--run", "wild")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}\n", b"[" * 99999 + b"\n", b"\x80\x04\x95\n", b"\n"]
)
def test_metrics_that_are_none(home, capsys, content):
    (home / "run/metrics.jsonl").write_bytes(content)
    assert "run/metrics.jsonl" in refused(capsys, "--run", "run")


def test_what_a_manifest_says_may_be_anything(home):
    """Of its reading: whoever made the pairs wrote it."""
    for number, reading in enumerate(
        ({"dropped": ["a"]}, {"dropped": {"why": "x"}, "source": ["y"]}, {"read": "\ud800"})
    ):
        write_store(home / f"s{number}", [scored()], tokenizer_name="oracle", reading=reading)
        run(f"s{number}")
    write_store(home / "s", [scored()], tokenizer_name="oracle", oracle_name="half \ud800")
    run("s")
    assert r"half \ud800" in (home / "report.html").read_text()


@pytest.mark.parametrize("form", ["html", "json", "png"])
def test_a_folder_as_other_commands_take_it(home, form):
    run("store", "--format", form, "--output_dir", "there/deeper")
    written = {file.name for file in (home / "there" / "deeper").iterdir()}
    if form == "png":
        assert written and all(name.endswith(".png") for name in written)
    else:
        assert written == {f"report.{form}"}
    assert not list(home.glob("report*"))


def test_a_file_or_a_folder(home, capsys):
    line = refused(capsys, "store", "-o", "page.html", "--output_dir", "there")
    assert "not allowed with argument -o/--output" in line
