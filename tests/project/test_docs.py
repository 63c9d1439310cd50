"""What README and docs/ show runs: snippets and the tutorial on a tiny model, the rest parses."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from documented_commands import check, commands
from tiny import V, random_scored_pairs, tiny_model, tiny_tokenizer
from training_run import write_store

from sepo.commands import main as cli
from sepo.cost.planner import plan
from sepo.masks import SparseMask
from sepo.masks.files import save_mask

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# drawings, and what a program printed, by how they begin; they are no code
SHOWN = (
    "412 rows carried",
    "Modelled, not measured",
    "What LLaMA3-8B's hours",
    "This project's schedule",
    "Against what is known",
    "Which costs the paper's hours",
    "Table 1, GPU-hours",
    "Table 5, GPU-hours",
    "By parts",
    "In the paper's own hours",
    "Against a public run",
)
STANDS_FOR = {  # what the pages' names are in a test
    "HuggingFaceTB/SmolLM2-135M-Instruct": "M",
    "python/sepo/demo/data/pairs.jsonl": "pairs.jsonl",
}

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str | None = None) -> list[tuple[str, str]]:
    """(kind, text) of a page's fenced blocks; a block without a kind is commands."""
    found = [(m[1] or "commands", m[2]) for m in FENCED.finditer(page.read_text(encoding="utf-8"))]
    found = [(k, text) for k, text in found if not text.lstrip().startswith(SHOWN)]
    return [(k, text) for k, text in found if kind in (None, k)]


def check_line(line: str) -> None:
    """Refuse a line of a block of commands that nothing here could run."""
    words = shlex.split(line, comments=True)
    if not words or "sepo.train" in words:
        return
    match words:
        case ["sepo", *rest]:
            check(rest)
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            targets = [word for word in targets if "=" not in word]
            assert set(targets) <= set(known), f"make {targets}, expected some of {known}"
        case ["python", "-m", module, *_]:
            spec = importlib.util.find_spec(module)
            if spec and spec.submodule_search_locations:  # a package runs by another file
                spec = importlib.util.find_spec(module + ".__main__")
            assert spec, f"no program {module}"
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), f"no file {script}"
        case ["pip", "install", *packages]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extra in re.findall(r"sepo\[([^]]+)\]", " ".join(packages)):
                assert set(extra.split(",")) <= set(project["optional-dependencies"]), extra
        case [".", ".venv/bin/activate"]:
            pass
        case _:
            pytest.fail(f"not a command that is known here: {line}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_understood(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for kind, text in blocks(page):
        match kind:
            case "python":
                compile(text, name(page), "exec")
            case "json":
                json.loads(text)
            case "yaml":  # an epoch to be planned
                (tmp_path / "plan.yaml").write_text(text)
                assert "GPU-hours" in plan(tmp_path / "plan.yaml")
            case "commands":
                rows = [row for row in text.split("\n\n") if row.startswith("{")]
                for row in rows:  # of data, shown before the command that reads it
                    json.loads(row)
                    text = text.replace(row, "")
                for line in text.replace("\\\n", " ").splitlines():
                    check_line(line)
            case "text":  # another library's program, beside ours
                ast.parse(text)
            case _:
                pytest.fail(f"a block of {kind}: nothing runs it")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_programs_and_files_named_in_a_sentence_exist(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for path in re.findall(r"`((?:examples|tests|docs|csrc|python)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"no file {path}"
    for line in re.findall(r"`((?:make|python -m|python [\w./]+\.py) ?[^`]*)`", text):
        check_line(line)


def test_a_wrong_block_is_seen(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line, message in (
        ("make coffee", "make .*coffee"),
        ("python -m bench.nothing", "no program"),
        ("python -m bench", "no program"),
        ("python examples/nothing.py", "no file"),
        ("pip install 'sepo[everything]'", "everything"),
        ("sepo score --dataset_name D --output_dir O", "--reference"),
        ("rm -rf runs", "not a command"),
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
            check_line(line)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    anchor = lambda title: re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, fragment = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target}: no such file"
        if fragment:
            titles = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, titles), f"{target}: no such heading"


def test_the_readme_is_read_in_a_minute_or_two():
    """A screen and a half, all of it counted: sentences, tables, commands and code."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert sum(any(map(str.isalnum, word)) for word in words) <= 700


def test_the_index_names_every_page():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the pages' names are what they say: M, runs/scored, runs/policy, pairs.jsonl."""
    tiny_model().save_pretrained(tmp_path / "M")
    tiny_tokenizer().save_pretrained(tmp_path / "M")
    write_store(tmp_path / "runs" / "scored", random_scored_pairs(12))
    (tmp_path / "runs" / "policy").mkdir()
    save_mask(SparseMask(2, 32), tmp_path / "runs" / "policy")
    rng = np.random.default_rng(0)
    words = lambda: " ".join(f"w{i}" for i in rng.integers(2, V, rng.integers(1, 9)))
    rows = [{k: words() for k in ("prompt", "chosen", "rejected")} for _ in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page: Path) -> dict:
    """The page's snippets, one after the other, as one program."""
    scope = {}
    for _, text in blocks(page, "python"):
        exec(compile(text, name(page), "exec"), scope)
    return scope


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p != TUTORIAL], ids=name
)
def test_the_snippets_of_a_page_run(page, home, capsys):
    run_python(page)
    if name(page) == "README.md":
        assert "schedule='save'" in capsys.readouterr().out
    if name(page) == "docs/training.md":
        assert (home / "runs" / "sepo").is_dir()


def test_the_tutorial_runs(home, capsys, monkeypatch):
    """Its commands in order, then its snippets, each on what the ones before it left."""
    shown = [words for _, text in blocks(TUTORIAL, "commands") for words in commands(text)]
    assert {"env", "inspect", "train", "score", "report"} == {words[0] for words in shown}
    for words in shown:
        argv = [STANDS_FOR.get(word, word) for word in words]
        if argv[0] == "train":
            # the warm-up's first step is no step
            argv += "--max_steps 3 --use_cpu --disable_tqdm true --save_strategy no".split()
        cli.run(argv)
    place = home / "runs" / "tutorial"
    weights = [(place / run / "model.safetensors").read_bytes() for run in ("policy", "random")]
    assert weights[0] != weights[1]
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    torch.manual_seed(0)
    scope = run_python(TUTORIAL)
    assert scope["sampled"].shape[1] > scope["prompt"].shape[1]
    assert (place / "again" / "model.safetensors").exists()
