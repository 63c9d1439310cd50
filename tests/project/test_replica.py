"""make replica tests what is declared: its versions are read out of the declarations."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def replica():
    spec = importlib.util.spec_from_file_location("replica", ROOT / ".ci" / "replica.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_declared_bound_is_in_it(replica):
    found = dict(line.split("==") for line in replica.bounds())
    setup = (ROOT / "setup.py").read_text()
    declared = setup[
        setup.index("DEPENDENCIES = [") : setup.index("]", setup.index("DEPENDENCIES"))
    ]
    names = set(re.findall(r'"([\w-]+)>=', declared)) - replica.ABSENT
    assert len(names) >= 7 and names | {"torch", "triton", "peft"} <= found.keys()
    assert "datasets" not in found and "trl" not in found
    assert f'"transformers>={found["transformers"]}"' in setup
    assert f'"torch>={found["torch"]}"' in (ROOT / "build_backend.py").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["triton"] == [f"triton>={found['triton']}"]


def test_its_tools_have_one_version(replica):
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{name}==", pinned, re.M) for name in replica.TOOLS)
    makefile = (ROOT / "Makefile").read_text()
    assert all(alone in makefile for alone in replica.ALONE)


def test_it_asks_for_disk_first(replica, monkeypatch, tmp_path):
    monkeypatch.setattr(replica, "DISK", 1e18)
    with pytest.raises(SystemExit, match="replica: expected 1000000000 GB of disk, got"):
        replica.install(tmp_path / "env", tmp_path / "env" / "bin" / "python")
    assert not list(tmp_path.iterdir())
