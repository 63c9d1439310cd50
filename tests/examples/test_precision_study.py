"""The precision study's arithmetics are what they say, and its parts run and resume."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from characters import character_tokenizer
from scoring_for_tests import make_pairs
from tiny import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from examples.precision import overlap, report, study
from examples.precision.arithmetic import Float64Only, RoundedProducts, tf32, to_tf32
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.score.logp import response_logp

PAIRS = make_pairs()


def test_tf32_has_10_bits_and_ties_go_to_even():
    ulp = 2.0**-10
    given = [1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.501 * ulp, 1 + ulp, 2 - 0.25 * ulp, 0.0, -0.0]
    expected = [1.0, 1 + 2 * ulp, 1 + ulp, 1 + ulp, 2.0, 0.0, -0.0]
    for sign in (1, -1):
        found = to_tf32(sign * torch.tensor(given))
        assert found.tolist() == [sign * x for x in expected]


def test_tf32_is_the_nearest():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    fraction, exponent = np.frexp(
        x.double().numpy()
    )  # fraction in [0.5, 1): 11 bits with the first
    assert np.array_equal(
        to_tf32(x).double().numpy(), np.ldexp(np.rint(fraction * 2**11), exponent - 11)
    )


class Recorder(TorchDispatchMode):
    """What reaches the machine beneath another mode."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args, out))
        return out


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_every_product_of_a_model_gets_rounded_operands(arch):
    model = prepare_model(tiny_model(arch))
    with Recorder() as recorder, tf32():
        response_logp(model, PAIRS[:2], "model", 1024)
    names = [name for name, _, _ in recorder.calls]
    linear = sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - 1  # the head apart
    assert sum(name in ("mm", "addmm") for name in names) == linear
    # products, layers, pairs, responses; and the angles, which older transformers multiply for
    assert names.count("bmm") - 2 * 2 * 2 * 2 in (0, 1)
    assert names.count("selected_logprob_fwd") == 1
    for name, args, _ in recorder.calls:
        if name in ("mm", "bmm", "addmm", "selected_logprob_fwd"):
            first = 1 if name == "addmm" else 0
            for operand in args[first : first + 2]:
                assert torch.equal(operand, to_tf32(operand)), name
                assert not torch.equal(operand, torch.zeros_like(operand)), name


def test_a_product_that_cannot_be_reached_is_refused():
    q = torch.randn(1, 1, 4, 8)
    for call in (
        lambda: F.scaled_dot_product_attention(q, q, q),
        lambda: q[0, 0] @ q[0, 0, 0],
        lambda: torch.dot(q[0, 0, 0], q[0, 0, 0]),
        lambda: F.conv1d(q[0], torch.randn(2, 1, 3)),
    ):
        with RoundedProducts(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            with pytest.raises(NotImplementedError, match="expected no product but"):
                call()


def test_tf32_of_one_layer_is_the_product_of_rounded_operands():
    x, layer = torch.randn(5, 32), torch.nn.Linear(32, 7)
    with torch.no_grad(), tf32():
        found = layer(x)
    expected = to_tf32(x).double() @ to_tf32(layer.weight.detach()).double().T + layer.bias.double()
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-6)  # sums in float32
    assert (found.double() - (x.double() @ layer.weight.double().T + layer.bias)).abs().max() > 2e-5


def test_float64_is_never_narrowed():
    model = tiny_model(dtype=torch.float32).double()
    ids = torch.arange(6)[None]
    with torch.no_grad(), Recorder() as recorder, Float64Only():
        model(ids, use_cache=False)
    narrow = {
        name
        for name, _, out in recorder.calls
        for x in (out if isinstance(out, (tuple, list)) else [out])
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
    }
    assert narrow == set()


def test_overlap_counts_shared_positions():
    true = [(np.array([0, 1]), np.array([2, 3])), (np.array([0, 1, 2]), np.array([4]))]
    found = [(np.array([0, 1]), np.array([0, 1])), (np.array([0, 1, 2]), np.array([4]))]
    result = overlap.compare(true, found)
    assert result["kept"] == pytest.approx((2 / 4 + 1) / 2)
    assert result["jaccard"] == pytest.approx((2 / 6 + 1) / 2)
    assert result["kept_ci95"][0] < 0.75 < result["kept_ci95"][1]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    row = dict(prompt="The film was", chosen=" good and nice", rejected=" bad, a sad waste")
    for name, count in (("pairs", 6), ("heldout", 3)):
        rows = [json.dumps(dict(row, id=f"{name}-{i}")) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    (tmp_path / "heldout_openings.txt").write_text("The plot\nHer voice\n")
    for settings in (study.ORACLE, study.POLICY):
        monkeypatch.setitem(settings, "pairs_per_step", 2)
    return [
        *("--output_dir", str(tmp_path / "out"), "--model", str(tmp_path / "model")),
        *("--data", str(tmp_path), "--steps", "2", "4", "--policy_oracle", "4"),
        *("--pairs", "3", "--seeds", "0", "--per_opening", "2"),
    ]  # fmt: skip


def test_the_study_runs_and_does_nothing_twice(arguments, tmp_path, monkeypatch):
    study.main(arguments)
    path = tmp_path / "out" / "study.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [row["part"] for row in rows]
    assert parts.count("overlap") == 2 * (len(overlap.VARIANTS) + 1)
    assert parts.count("policy") == 4 and parts.count("policies") == 4
    by = {(r["oracle_steps"], r["variant"]): r for r in rows if r["part"] == "overlap"}
    assert by[4, "float32"]["jaccard"] > by[4, "bfloat16"]["jaccard"]
    errors = [by[4, name]["error_mean"] for name in ("float32", "tf32", "bfloat16")]
    assert errors[0] < errors[1] / 20 < errors[2] / 60
    assert by[4, "float32"]["spread"] > by[2, "float32"]["spread"] > 0
    # killed before the last line and before one policy: only those are done again
    lines = path.read_text().splitlines(keepends=True)
    again = [i for i, row in enumerate(rows) if row["part"] == "policy"][-1]
    path.write_text("".join(lines[:again] + lines[again + 1 : -1]))
    monkeypatch.setattr(study, "train_oracles", None)
    monkeypatch.setattr(overlap, "measure", None)
    study.main(arguments)
    resumed = [json.loads(line) for line in path.read_text().splitlines()]
    without_time = lambda rows: sorted(
        json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows
    )
    assert without_time(resumed) == without_time(rows)
    with pytest.raises(InputError, match="--pairs: expected 3, .* got 2"):
        study.main([*arguments, "--pairs", "2"])
    for name, some in (("both", rows), ("one", [r for r in rows if r["part"] == "overlap"])):
        report.draw(some, tmp_path / f"{name}.svg")
    drawn = [(tmp_path / f"{name}.svg").read_text() for name in ("both", "one")]
    assert ["mean sentiment" in text for text in drawn] == [True, False]
    assert all("share of the float64 selection kept" in text for text in drawn)
    table = report.overlap_table(rows)
    assert len(table) == 3 + len(report.LABELS) and {line.count("|") for line in table} == {4}
    kept = by[4, "bfloat16"]["kept"]
    assert f" | {kept:.3f} ± " in next(line for line in table if line.startswith("| bfloat16 |"))
    assert len(report.policy_table(rows)) == 2 + 4


def test_one_arithmetic_alone_and_no_policies(arguments, tmp_path):
    study.main([*arguments, "--steps", "2", "--variants", "split", "--seeds"])
    lines = (tmp_path / "out" / "study.jsonl").read_text().splitlines()
    found = [(row["part"], row.get("variant")) for row in map(json.loads, lines)]
    assert found == [("settings", None), ("oracles", None), ("overlap", "split")]
