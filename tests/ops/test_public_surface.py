"""What dir(), help() and a type checker show of the public modules is what they export."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import sepo
from sepo import losses, ops, patch

ROOT = Path(__file__).parents[2]


def visible(module: ModuleType) -> dict:
    """None for a name that is loaded late: its package need not be installed."""
    return {name: vars(module).get(name) for name in dir(module) if not name.startswith("_")}


def modules_in(module: ModuleType) -> set[str]:
    return {name for name, value in visible(module).items() if isinstance(value, ModuleType)}


@pytest.mark.parametrize("module", [ops, patch, sepo], ids=lambda m: m.__name__)
def test_exported_names_are_visible_names(module):
    assert module.__all__ == sorted(set(module.__all__))
    assert set(visible(module)) - modules_in(module) == set(module.__all__)


@pytest.mark.parametrize("module", [ops, patch], ids=lambda m: m.__name__)
def test_no_module_is_taken_for_an_operation(module):
    assert not modules_in(module)


def test_losses_export_what_they_define():
    own = {name for name, f in visible(losses).items() if inspect.isfunction(f)}
    assert own == set(losses.__all__)
    assert own & set(ops.__all__) == {name for name in own if name.endswith("_loss")}


@pytest.mark.parametrize("module", [sepo, patch], ids=lambda m: m.__name__)
def test_names_that_are_loaded_late_have_types(module):
    """A type checker does not run __getattr__: the same names are imported for it alone."""
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(seen) == set(module._HOME) <= {*dir(module)} & {*module.__all__}
    for name, home in seen.items():  # a room's own file, where _HOME may name the room
        assert f"{home}.".startswith(f"{module._HOME[name]}."), name
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'SFT'"):
        module.SFT  # noqa: B018


@pytest.mark.parametrize("module", ["sepo", "sepo.patch"])
def test_dir_loads_nothing(module):
    code = f"import sys, {module} as m; dir(m); print('trl' in sys.modules, 'sepo.trainer' in sys.modules)"
    command, path = [sys.executable, "-c", code], {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "python" / "sepo" / "py.typed").is_file()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "py.typed" in tools["setuptools"]["package-data"]["sepo"]


FUNCTIONS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (ops, losses)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}
FUNCTIONS |= {
    f"sepo.patch.{name}": getattr(patch, name)
    for name in ("collate_pairs", "labelled_pairs", "masked_pairs", "transformers")
}


def described(doc: str, section: str) -> list[str]:
    """Names that a section of a docstring begins its entries with."""
    found = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    return re.findall(r"^    ([\w.]+): ", found[1], re.MULTILINE) if found else []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_names_every_argument(name):
    doc, signature = inspect.getdoc(FUNCTIONS[name]), inspect.signature(FUNCTIONS[name])
    assert described(doc, "Args") == list(signature.parameters)
    if name.startswith("sepo.patch"):
        return
    assert described(doc, "Returns") == [signature.return_annotation.__name__]
    assert "ValueError" in described(doc, "Raises")


@pytest.mark.parametrize("name", [n for n in ops.__all__ if isinstance(getattr(ops, n), type)])
def test_help_names_every_field(name):
    kind = getattr(ops, name)
    assert described(inspect.getdoc(kind), "Attributes") == list(kind._fields)


PAPERS = {
    "sepo_loss": ("2408.13518", "eq. 11"),
    "simpo_loss": ("2405.14734", "eq. 6"),
    "dpo_loss": ("2305.18290", "eq. 7"),
    "ipo_loss": ("2310.12036", "eq. 17"),
    "rrhf_loss": ("2304.05302", "eq. 3-5"),
    "dpop_loss": ("2402.13228", "eq. 3"),
    "dpop_logratio": ("2402.13228", "DPO-Positive"),
    "tdpo_loss": ("2404.11999", "eq. 16"),
    "sparsepo_loss": ("2410.05102", "eq. 6-8"),
}


@pytest.mark.parametrize("name", losses.__all__)
def test_help_names_paper_and_equation(name):
    doc = inspect.getdoc(getattr(losses, name))
    assert all(words in doc for words in PAPERS[name])
    assert "nats" in doc and "(2 P,) floating point" in doc
