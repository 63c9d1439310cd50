"""What a forge reads of this repository agrees with the rest of it."""

import re
import tomllib

import pytest
import yaml
from processes import ROOT

import sepo


def read(path: str):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_workflow_runs_the_commands_of_the_readme():
    (job,) = read(".github/workflows/test.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("make")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert commands == ["make test", "make demo"]
    assert all(re.search(rf"^{command}\b", readme, re.MULTILINE) for command in commands)
    assert f"exec {commands[0]}\n" in (ROOT / ".ci" / "run").read_text()
    assert job["strategy"]["matrix"] == {
        "python": ["3.11", "3.13"],
        "compiler": ["with", "without"],
    }
    for step in job["steps"]:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + 40 * "0"))
    assert "secrets" not in str(job)


def test_the_versions_of_python_are_those_that_are_tested():
    declared = [line.rpartition(" ")[2] for line in project()["classifiers"] if ":: 3." in line]
    (job,) = read(".github/workflows/test.yml")["jobs"].values()
    assert [declared[0], declared[-1]] == job["strategy"]["matrix"]["python"]
    assert project()["requires-python"] == f">={declared[0]}"


def test_a_bug_report_asks_for_the_environment():
    asked = {part["id"]: part for part in read(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "`sepo env`" in asked["env"]["attributes"]["label"]
    assert all(part["validations"]["required"] for part in asked.values())


def test_hooks_lint_as_make_does():
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    assert hooks == ["ruff check --force-exclude", "ruff format --force-exclude"]
    makefile = (ROOT / "Makefile").read_text()
    assert "$(BIN)/ruff check ." in makefile and "$(BIN)/ruff format --check ." in makefile


def test_type_errors_are_left_in_no_other_module():
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    left = {name for rule in rules if rule.get("ignore_errors") for name in rule["module"]}
    assert left <= {"sepo.trainer.config", "sepo.trainer.methods"}
    assert "$(BIN)/mypy -p sepo_kernels -p sepo\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "DESIGN.md"])
def test_tests_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w./-]+)`", text)
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_rooms_of_the_design_are_the_folders():
    tree = re.search(r"```\n(csrc/.*?)```", (ROOT / "DESIGN.md").read_text(), re.DOTALL)[1]
    top = re.findall(r"^([\w/]+)/ ", tree, re.MULTILINE)
    assert not [folder for folder in top if not (ROOT / folder).is_dir()]
    package = ROOT / "python" / "sepo"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == rooms


def test_a_citation_is_of_this_version():
    cited = read("CITATION.cff")
    assert str(cited["version"]) == sepo.__version__ == project()["version"]
    assert cited["license"] == project()["license"]
    assert cited["references"][0]["url"] == project()["urls"]["Paper"]
