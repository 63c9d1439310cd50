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
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    # those of the extras that the demo's names, too
    names = {re.split("[>=]", line)[0] for line in extras["train"]} - replica.ABSENT
    assert len(names) >= 7 and names | {"torch", "triton", "peft", "matplotlib"} <= found.keys()
    assert "datasets" not in found and "trl" not in found
    assert f'"numpy>={found["numpy"]}"' in (ROOT / "setup.py").read_text()
    assert f'"torch>={found["torch"]}"' in (ROOT / "build_backend.py").read_text()
    assert f"transformers>={found['transformers']}" in extras["train"]
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
