"""The comparison of hours: a measured step by hand, the plan's own stages, and each labelled."""

import re
from types import SimpleNamespace

import pytest
import yaml

from bench import run
from sepo.cost import epochs, planner
from sepo.cost.gpu import GPUS

SECONDS = {
    "TRL DPO": 8.0,
    "TRL SimPO": 4.0,
    "dpo, cached reference": 2.0,
    "simpo": 1.5,
    "sepo 30 %": 1.0,
    "sepo 30 %, checkpointing": 99.0,
}


def rows(text: str) -> dict[str, list[str]]:
    found = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[3:])
    return {name: cells for name, *cells in found if name in epochs.ROWS}


def test_measured_hours_are_seconds_a_pair_times_the_pairs():
    found = epochs.Measured("", SECONDS, 0.5).hours()
    a_second = 61_135 / 3600
    oracle = 0.5 + 2.0 + 0.5  # reference's pass, DPO, its own pass
    assert {name: hours / a_second for name, hours in found.items()} == pytest.approx(
        {
            "TRL DPO": 8.0,
            "TRL SimPO": 4.0,
            "DPO": 2.5,
            "SimPO": 1.5,
            "SePO": 1.0,
            "SePO and its oracle": 1.0 + oracle,
        }
    )


def test_modelled_hours_are_those_of_a_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    keys = dict(oracle_model=epochs.ORACLE, truncated_tokens=260, gpu="H100")
    path.write_text(yaml.safe_dump(epochs.RECIPE | keys))
    text = planner.plan(path)
    (everything,) = re.findall(r"^all +([\d.]+)", text, re.MULTILINE)
    found = epochs.modelled("H100")
    assert f"{found['SePO and its oracle']:.2f}" == everything
    for name in ("DPO", "SimPO"):
        assert f"would take {found[name]:.2f}" in " ".join(text.split())
    assert found["... scored by split products"] < found["SePO and its oracle"]
    assert found["SePO"] < found["SimPO"] < found["DPO"] < found["TRL DPO"]


def test_a_run_ends_with_the_comparison():
    row = lambda name, seconds: SimpleNamespace(contender=name, median=seconds)
    about = dict(model="a model", max_length=192, reference_seconds=0.5)
    step = SimpleNamespace(
        suite="step",
        about=about,
        rows=[row(*pair) for pair in SECONDS.items()] + [row("gone", 0.0)],
    )
    head = SimpleNamespace(suite="head", about={}, rows=[])
    text = run.hours_of_an_epoch([head, step], "a CPU")
    found = rows(text)
    assert [*found] == [*epochs.ROWS] and {len(cells) for cells in found.values()} == {
        1 + len(GPUS)
    }
    assert found["TRL DPO"][0] == f"{8 * 61_135 / 3600:.2f}" and found[epochs.ROWS[-1]][0] == "-"
    said = " ".join(text.split())
    assert "Measured here: a model, pairs of at most 192 tokens, on a CPU." in said
    assert "Modelled, not measured: LLaMA3-8B" in said
    without = run.hours_of_an_epoch([head], "a CPU")
    assert {cells[0] for cells in rows(without).values()} == {"-"}
    assert "no step was measured" in without
