"""With torch and numpy alone operations work; what else is asked names its extra in a line."""

import re
import subprocess
import sys
import tomllib

import pytest
from processes import ENVIRONMENT, ROOT

from sepo.commands.main import COMMANDS
from sepo.errors import EXTRAS, needs

# None in sys.modules: importing the package fails, and asking for its spec finds none
BLOCK = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(','))); "
RUN = (
    "from sepo import cli; from sepo.errors import exit_with_one_line; exit_with_one_line(cli.run)"
)
MODULE = "import runpy; runpy.run_module('sepo.train', run_name='__main__', alter_sys=True)"
LATER = {"datasets"}  # asked for where something is read that nothing else reads
ALL = sorted({*EXTRAS["demo"], *LATER, "peft", "tokenizers", "huggingface_hub"})
ROOMS = ("score", "model", "trainer", "data.store", "transfer")
# one that is missing alone: transformers hides some of them behind names of its own
ONE = {
    "train": "accelerate",
    "score": "pyarrow",
    "transfer": "transformers",
    "inspect": "safetensors",
    "report": "jinja2",
    "demo": "vaderSentiment",
}
NEED_NONE = {"env", "plan"}  # but what a plan reads


def without(packages, code: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", BLOCK + code, ",".join(packages), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def test_the_names_are_what_the_extras_declare():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]

    def names(extra: str) -> set[str]:
        """Of what pip installs, as they are imported."""
        found = set()
        for line in declared[extra]:
            if others := re.fullmatch(r"sepo\[(.+)\]", line):
                found |= set().union(*map(names, others[1].split(",")))
            else:
                found.add(re.match(r"[\w-]+", line)[0].replace("pyyaml", "yaml"))
        return found

    for extra, listed in EXTRAS.items():
        assert names(extra) == {*listed, *LATER}
    assert names("demo") | names("peft") < names("dev")
    assert names("report") < names("bench")


def test_every_command_is_here():
    assert {"train", "env", *(name for name, *_ in COMMANDS)} == ONE.keys() | NEED_NONE


@pytest.mark.parametrize("command", ONE)
@pytest.mark.parametrize("alone", [False, True], ids=["all", "one"])
def test_a_command_names_what_is_missing_and_its_extra(command, alone):
    done = without([ONE[command]] if alone else ALL, RUN, command, "--help")
    expected = r"sepo: error: sepo (\w+) needs (\w+), which is not installed: (.+)\n"
    said = re.fullmatch(expected, done.stderr)
    assert done.returncode == 2 and not done.stdout and said, done.stderr
    extra = command if command in EXTRAS else "train"
    assert said[1] == command and said[3] == f"pip install 'sepo[{extra}]'"
    assert said[2] == (ONE[command] if alone else EXTRAS[extra][0])


def test_so_does_the_script():
    done = without(ALL, MODULE, "--help")
    assert done.returncode == 2
    assert done.stderr.startswith("sepo: error: sepo train needs transformers, which is not")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "shown"),
    [(["--help"], "usage: sepo"), (["--version"], "sepo 0."), (["env"], "attention needs")],
)
def test_what_needs_no_extra(argv, shown):
    done = without(ALL, RUN, *argv)
    assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout
    assert ("transformers: " in done.stdout) == (argv == ["env"])  # which says what is installed
    assert "Error" not in done.stdout


def test_the_operations_need_no_extra():
    """README's first snippet."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "import sepo.ops" in snippet
    done = without(ALL, snippet)
    assert (done.returncode, done.stderr) == (0, "") and "schedule=" in done.stdout


def test_in_python_it_is_an_import_error():
    code = f"""
import importlib, sepo
for name in ("SePOTrainer", "SePOConfig", *{ROOMS}):
    try:
        getattr(sepo, name) if name[0] == "S" else importlib.import_module("sepo." + name)
    except ImportError as error:
        print(isinstance(error, ValueError), error)
"""
    done = without(["pyarrow", "transformers"], code)
    assert done.stdout.splitlines() == [
        f"True sepo.{name} needs transformers, which is not installed: pip install 'sepo[train]'"
        for name in ("SePOTrainer", "SePOConfig", *ROOMS)
    ], done.stderr


def test_figures_for_papers_need_matplotlib():
    code = "from sepo.report.png import write_pngs; write_pngs([], None, owner='')"
    done = without(["matplotlib"], code)
    assert done.stderr.splitlines()[-1].endswith(
        "writing PNG files needs matplotlib, which is not installed: pip install 'sepo[report]'"
    )


def test_an_import_that_fails_for_another_reason_stays():
    with pytest.raises(ModuleNotFoundError, match="^No module named 'nothing_of_ours'$"):
        with needs("demo", "this"):
            import nothing_of_ours  # noqa: F401
