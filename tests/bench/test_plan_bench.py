"""`sepo plan`: one of its three questions, and how full and even micro-batches are, by hand."""

import json

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from sepo.commands import main as cli
from sepo.cost.batches import measures
from sepo.data import StepPlan
from sepo.errors import InputError


def test_measures_by_hand():
    lengths = np.array([8, 10, 9, 2])
    plan = StepPlan(np.arange(4), (((1,), (3,)), ((2,), (0,))))
    found = measures(plan, lengths, lengths * 2.0, budget=10)
    mean = 29 / 2
    assert found == pytest.approx((2, 29 / 40, 19 / 20, 17 / mean, (10 + 8) / mean))


def test_nothing_but_the_last():
    plan = StepPlan(np.arange(2), (((0,),), ((1,),)))
    count, full, but_last, *_ = measures(plan, np.array([3, 5]), np.ones(2), budget=8)
    assert (count, full) == (1, 0.5) and np.isnan(but_last)


def test_lengths_of_a_data_set_are_planned(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "M")
    tiny_tokenizer().save_pretrained(tmp_path / "M")
    rows = [dict(prompt="w5 w6", chosen="w7 " * n, rejected="w8") for n in (3, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["plan", "--dataset_name", str(tmp_path / "pairs.jsonl")]
    argv += ["--model_name_or_path", str(tmp_path / "M"), "--pairs", "64", "--steps", "2"]
    cli.run([*argv, "--budgets", "4", "64", "--world_sizes", "2"])
    said = capsys.readouterr().out
    assert ": 2 pairs of " in said and "budget 4: left out, the longest pair has " in said
    steps = [line for line in said.splitlines() if line.startswith("budget     64 ranks  2 pairs")]
    assert len(steps) == 2 and all(line.count("%") >= 1 for line in steps)


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "expected CONFIG, --papers or --dataset_name, got 0 of them"),
        (["plan.yaml", "--papers"], "expected CONFIG, --papers or --dataset_name, got 2 of them"),
        (["--papers", "--steps", "3"], "--steps: expected --dataset_name with it, got none"),
        (["--dataset_name", "D"], "--model_name_or_path: expected whose tokenizer"),
    ],
)
def test_a_question_that_is_none_is_refused(argv, said):
    with pytest.raises(InputError, match=said):
        cli.run(["plan", *argv])
