"""Every recipe, and every command that a page shows, is one that the program understands."""

import json
import re
from pathlib import Path

import pytest
import yaml
from documented_commands import check, commands
from tiny import random_scored_pairs
from training_run import make_run

from sepo.train import main as train
from sepo.train import parse
from sepo.trainer.methods import METHODS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")]
)
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
# one recipe a method, but for methods without a recipe of their own
FAMILIES = {yaml.safe_load(path.read_text())["method"]: path for path in RECIPES}

name = lambda path: str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_is_what_its_header_says(recipe):
    """Each command of the header parses, and one of them trains with this very file."""
    header = "\n".join(
        line[1:].strip() for line in recipe.read_text().splitlines() if line[:1] == "#"
    )
    shown = commands(header)
    for words in shown:
        check(words)
    own = [words for words in shown if words[0] == "train" and name(recipe) in words]
    assert len(own) == 1, f"expected one command with {name(recipe)}, got {shown}"
    args, values = parse([*own[0][1:], "--use_cpu"]), yaml.safe_load(recipe.read_text())
    for key, value in values.items():
        if value == "auto":
            assert isinstance(getattr(args, key), bool), key  # as this machine has it
        elif key != "gradient_checkpointing":  # transformers may have renamed it
            assert getattr(args, key) == value, key


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_of_a_page_are_understood(page):
    for block in FENCED.findall(page.read_text(encoding="utf-8")):
        for words in commands(block):
            check(words)


def test_pages_with_commands_are_found():
    """A pattern that finds nothing would make the test above empty."""
    shown = [
        words
        for page in PAGES
        for block in FENCED.findall(page.read_text(encoding="utf-8"))
        for words in commands(block)
    ]
    assert {"train", "score", "inspect"} <= {words[0] for words in shown}
    assert len(shown) > 20


def test_a_wrong_command_is_seen():
    with pytest.raises(Exception, match="unknown argument --gama"):
        check(
            commands(
                "sepo train --config examples/recipes/sepo.yaml --model_name_or_path M \\\n"
                "  --dataset_name D --gama 2"
            )[0]
        )
    with pytest.raises(pytest.fail.Exception, match="--reference"):
        check(commands("sepo score --dataset_name D --output_dir O  # no model")[0])
    with pytest.raises(AssertionError, match="no command scroe"):
        check(commands("sepo scroe --dataset_name D")[0])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes")
    make_run(path)
    rows = [
        {f"{part}_ids": getattr(pair, part).tolist() for part in ("prompt", "chosen", "rejected")}
        for pair in random_scored_pairs(12)
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("method", sorted(FAMILIES))
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's
def test_a_recipe_of_each_method_trains(home, tmp_path, method):
    """Two steps of the recipe's own settings on a tiny model; only the sizes are the test's."""
    sizes = "--max_steps 2 --pairs_per_step 4 --max_tokens_per_batch 64 --logging_steps 1"
    data = home / ("store" if METHODS[method].needs_score else "pairs.jsonl")
    paths = f"--model_name_or_path {home / 'model'} --dataset_name {data}"
    how = "--use_cpu --bf16 false --disable_tqdm true --save_strategy no --report_to none"
    out = tmp_path / "out"
    train(["--config", str(FAMILIES[method]), *f"{paths} {sizes} {how} --output_dir {out}".split()])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 1e4 for loss in losses)
