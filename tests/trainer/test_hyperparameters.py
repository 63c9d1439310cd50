"""NaN and infinity are refused for every number that a run is told, before anything is read."""

import math
from dataclasses import fields
from typing import get_args

import pytest

from sepo import SePOConfig, train
from sepo.errors import InputError

FLOATS = [f.name for f in fields(SePOConfig) if f.type is float or float in get_args(f.type)]


NEEDED = ["--model_name_or_path", "model", "--dataset_name", "data"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_hyperparameters_are_finite(name, value):
    with pytest.raises(InputError, match=f"^--{name}: expected a (finite )?number.*, got {value}"):
        SePOConfig(output_dir="unused", use_cpu=True, **{name: value})


def test_what_is_walked_over():
    assert len(FLOATS) > 25
    assert {"gamma", "margin", "tdpo2_alpha", "learning_rate", "beta", "fraction"} <= set(FLOATS)


@pytest.mark.parametrize(
    "given", [["--gamma", "nan"], ["--margin=inf"], ["--tdpo2_alpha=-Infinity"]]
)
def test_on_the_command_line(tmp_path, given):
    with pytest.raises(
        InputError, match="--(gamma|margin|tdpo2_alpha): expected a finite number, got"
    ):
        train.parse([*NEEDED, "--output_dir", str(tmp_path), *given])


def test_in_a_file_and_within_a_value(tmp_path):
    (tmp_path / "run.yaml").write_text("dpop_lambda: .inf\n")
    with pytest.raises(InputError, match="dpop_lambda: expected a number, got .inf"):
        train.parse([*NEEDED, "--output_dir", "out", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(
        InputError, match="--lr_scheduler_kwargs: expected a finite number, got nan"
    ):
        SePOConfig(output_dir="out", use_cpu=True, lr_scheduler_kwargs={"a": [1.0, math.nan]})
