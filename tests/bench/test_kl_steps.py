"""The race of the KL methods: the dense step and ours are one, and no speed for a wrong one."""

import json

import pytest
import torch
from bench_jobs import finished, stepping
from tiny import V, tiny_model

from bench.contender import Contender
from bench.harness import Row, check
from bench.run import main
from bench.steps import dense, models, ours, table
from bench.steps import pairs as rows
from bench.steps.inputs import FLOAT32, Steps
from bench.steps.models import Weights
from sepo.trainer.step import MASK


def dealt(method: str, *, rounds: int = 1) -> tuple[Weights, list[list]]:
    """A policy near its reference, with a mask where the method has one; round 0 is the gate's."""
    weights = Weights(tiny_model())
    if method == "sparsepo":
        weights.add(MASK, ours.new_mask(weights))
    return weights, rows.deal(rows.drawn_pairs(3 * rounds, V, 48), rounds, 3)


def everybody(method: str, weights: Weights, rounds: list[list]) -> list[Contender]:
    options = dict(bf16=False)
    return [
        *dense.contenders(method, weights, rounds, **options),
        *ours.kl_contenders(method, weights, rounds, **options),
    ]


@pytest.mark.parametrize("method", ("tdpo2", "sparsepo"))
def test_everybody_has_the_same_loss_and_gradient(method):
    weights, rounds = dealt(method)
    inputs = Steps(everybody(method, weights, rounds), weights, rounds, dense.truth)
    assert all(gradient.abs().max() > 0 for gradient in inputs.truth(method).gradients)
    for contender in inputs.contenders:
        reason, errors = check(contender, inputs, FLOAT32)
        assert reason == "", contender.name
        assert errors["cosine"] > 0.999999, contender.name
        contender.lower()  # in float32 nothing may change
        assert check(contender, inputs, FLOAT32)[1] == errors, contender.name


def shifted_mask(mask, states, right=dense.learned_mask):
    return right(mask, [state.roll(1, 1) for state in states])


def kl_with_gradient(ratio, kl):  # TDPO2 without its stop-gradient: the same value
    margin = ratio[0] - ratio[1] - 0.5 * (kl[1] - kl[0])
    return -torch.nn.functional.logsigmoid(0.1 * margin)


def one_norm(ratio, kl, norm, right=dense.sparsepo):
    return right(ratio, kl, [n / 2 for n in norm])


WRONG = {
    "no stop-gradient": ("tdpo2", "tdpo2", kl_with_gradient, "gradient"),
    "prompt": ("tdpo2", "responses", lambda pairs, ids: torch.ones(ids[:, 1:].shape), "loss"),
    "shifted mask": ("sparsepo", "learned_mask", shifted_mask, "loss"),
    "half the L1": ("sparsepo", "sparsepo", one_norm, "loss"),
}


@pytest.mark.parametrize("method, name, wrong, what", WRONG.values(), ids=WRONG)
def test_a_dense_step_that_is_wrong_is_refused(method, name, wrong, what, monkeypatch):
    weights, rounds = dealt(method)
    contender, _ = dense.contenders(method, weights, rounds, bf16=False)
    inputs = Steps([contender], weights, rounds, dense.truth)
    inputs.truth(method)
    monkeypatch.setattr(dense, name, wrong)
    reason, _ = check(contender, inputs, FLOAT32)
    assert f"{what} is off by" in reason
    assert what == "loss" or "loss" not in reason


def test_only_what_is_right_has_a_speed(monkeypatch):
    """Ours with another alpha, and with the gradient of its mask spoilt, beside what is right."""
    weights, rounds = dealt("tdpo2", rounds=2)
    fine, cached, again, memory = ours.kl_contenders("tdpo2", weights, rounds, bf16=False)
    monkeypatch.setitem(ours.SETTINGS, "tdpo2", dict(beta=0.1, alpha=1.0))
    other = ours.kl_contenders("tdpo2", weights, rounds, bf16=False)[0]
    other.name = "alpha 1"
    monkeypatch.undo()
    racers = [fine, cached, again, memory, other]
    found = finished(stepping(racers, weights, rounds, dense.truth))
    assert [row.status for row in found] == ["measured"] * 4 + ["refused"]
    assert [len(row.seconds) for row in found] == [2, 2, 2, 0, 0]
    assert all(row.peak_bytes > 0 for row in found[:4])
    assert "refused: loss is off by" in table.table(found, "tdpo2")

    weights, rounds = dealt("sparsepo")
    ours_now = ours.kl_contenders("sparsepo", weights, rounds, bf16=False)[0]
    step = ours_now.run

    def spoilt(number: int):
        value = step(number)
        weights.model.get_submodule(MASK).reward.mixer.grad.mul_(1.1)
        return value

    ours_now.run = spoilt
    (row,) = finished(stepping([ours_now], weights, rounds, dense.truth))
    assert row.status == "refused" and "gradient is off by" in row.reason


def test_bars():
    row = lambda name, seconds, peak: Row(
        "step", "", name, "measured", contender=name, seconds=seconds, peak_bytes=peak
    )
    rows = [
        row("dense tdpo2", [6.0, 8.0], 90),
        row("dense tdpo2, checkpointing", [], 80),
        row("tdpo2", [2.0, 2.0], 31),
        row("tdpo2, cached rows", [1.0, 1.0], 30),
        row("tdpo2, checkpointing", [], 10),
    ]
    assert table.bars(rows, *table.kl_bars("tdpo2")).split("\n") == [
        "tdpo2 is 3.50 x as fast as dense tdpo2: reaches 3",
        "tdpo2, cached rows is 7.00 x as fast as dense tdpo2: reaches 3",
        "tdpo2 needs 1/2.90 of the memory of dense tdpo2: misses 3",
        "tdpo2, cached rows needs 1/3.00 of the memory of dense tdpo2: reaches 3",
        "tdpo2, checkpointing needs 1/8.00 of the memory of dense tdpo2, checkpointing: reaches 3",
    ]


def test_the_whole_program(tmp_path, monkeypatch, capsys):
    shape = dict(tiny_model().config.to_dict(), vocab_size=V, initializer_range=0.2)
    keys = models.SHAPES["smollm2-shape"].keys()
    monkeypatch.setitem(models.SHAPES, "tiny", {k: shape[k] for k in keys if k in shape})
    path = tmp_path / "rows.jsonl"
    arguments = "--case step-tdpo2 step-sparsepo --model tiny --pairs 2 --rounds 1 --max_length 48 --float32"
    files = "--json", str(path), "--figure", str(tmp_path / "figure.svg")
    assert main([*arguments.split(), "--device", "cpu", *files]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = ["dense {}", "dense {}, checkpointing", "{}", "{}, cached rows", "{}, cheap again"]
    names.append("{}, checkpointing")
    expected = [name.format("tdpo2") for name in names]
    expected += [name.format("sparsepo") for name in names if "cached" not in name]
    assert [line["contender"] for line in lines] == expected
    assert {line["status"] for line in lines} == {"measured"}
    assert [len(line["seconds"]) for line in lines] == [1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0]
    said = capsys.readouterr().out
    assert "weights float32, no autocast" in said and str(path) in said
