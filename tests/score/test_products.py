"""A model that scores by products of halves: its error, what goes through them, and `auto`."""

import numpy as np
import pytest
import torch
from scoring_for_tests import ORACLE, QUIET, REFERENCE, make_models, make_pairs, parts, tiny_in
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.score import arithmetic, products
from sepo.score.logp import response_logp
from sepo.score.products import SplitProducts
from sepo.score.score import score_dataset, score_pairs

BOTH = dict(reference=REFERENCE, oracle=ORACLE)
PAIRS = make_pairs()


def logp(model, halves=None):
    found = response_logp(model, PAIRS, "model", 8192, products=halves)
    return np.concatenate([side for pair in found for side in pair])


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gpt2", "qwen2", "gemma2"])
def test_error_is_that_of_the_halves(arch):
    model, exact = prepare_model(tiny_model(arch)), tiny_model(arch, dtype=torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    truth = logp(prepare_model(exact))
    before = logp(model)
    errors = {"float32": np.abs(before - truth).mean()}
    errors["split"] = np.abs(logp(model, SplitProducts(model, "split")) - truth).mean()
    errors["bfloat16"] = np.abs(logp(prepare_model(tiny_model(arch).bfloat16())) - truth).mean()
    assert errors["float32"] < errors["split"] < errors["bfloat16"] / 100
    assert np.array_equal(logp(model), before)  # outside of the pass nothing is changed


class Calls(TorchDispatchMode):
    """Names of the operators beneath."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("arch", "layers"), [("llama", 14), ("gpt_neox", 8), ("gpt2", 8)])
def test_every_linear_layer_and_the_head_go_through_halves(arch, layers):
    model = prepare_model(tiny_model(arch))
    halves = SplitProducts(model, "split")
    assert halves.layers == layers + 1
    with Calls() as calls:
        response_logp(model, PAIRS[:2], "model", 8192, products=halves)
    assert calls.names.count("split_linear") == layers
    assert calls.names.count("selected_logprob_fwd") == 1
    assert not {"mm", "addmm", "linear"} & set(calls.names)


def test_two_products_are_found_where_weights_are_exact_in_bfloat16():
    rounded = prepare_model(tiny_model(dtype=torch.bfloat16).float())
    halves = SplitProducts(rounded, "split")
    assert halves.of_two == halves.layers
    with torch.no_grad():
        rounded.model.layers[1].mlp.up_proj.weight[3, 4] += 2**-20
    assert SplitProducts(rounded, "split").of_two == halves.layers - 1
    assert SplitProducts(REFERENCE, "split").of_two == 0


def test_a_store_in_halves_says_so_and_is_compared(tmp_path, capsys):
    score_dataset(PAIRS, tmp_path, **BOTH, arithmetic="split", **QUIET)
    printed = capsys.readouterr().out
    assert "reference: split, 15 products of weights from bfloat16 halves, 0 of them" in printed
    assert "reference split and oracle split against float32 on 10 pairs" in printed
    store = ScoredStore.open(tmp_path)
    assert store.manifest["oracle_arithmetic"] == store.manifest["reference_arithmetic"] == "split"
    assert store.manifest["oracle_dtype"] == "float32"
    assert store.manifest["precision_check"]["overlap"] == {"0.1": 1, "0.3": 1, "0.5": 1}
    halves = {role: SplitProducts(model, "split") for role, model in BOTH.items()}
    expected = score_pairs(PAIRS, **BOTH, products=halves)
    plain = score_pairs(PAIRS, **BOTH)
    for found, same, other in zip(store.pairs(), expected, plain, strict=True):
        assert np.array_equal(found.chosen_score, same.chosen_score)
        np.testing.assert_allclose(found.chosen_score, other.chosen_score, atol=1e-3)


def test_one_model_in_halves(tmp_path):
    score_dataset(
        PAIRS, tmp_path, **BOTH, arithmetic={"oracle": "split"}, precision_check=0, **QUIET
    )
    manifest = ScoredStore.open(tmp_path).manifest
    assert manifest["oracle_arithmetic"] == "split" and "reference_arithmetic" not in manifest


def test_a_kept_reference_in_halves_is_remembered(tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    score_dataset(PAIRS, kept, reference=REFERENCE, keep=("logp",), arithmetic="split", **QUIET)
    with_kept = dict(reference=None, oracle=ORACLE, **QUIET)
    score_dataset(ScoredStore.open(kept), out, arithmetic="split", **with_kept)
    manifest = ScoredStore.open(out).manifest
    assert manifest["reference_arithmetic"] == manifest["oracle_arithmetic"] == "split"


@pytest.mark.parametrize(("first", "then"), [("split", "float32"), ("float32", "split")])
def test_a_store_begun_in_another_arithmetic(tmp_path, first, then):
    score_dataset(PAIRS, tmp_path, **BOTH, arithmetic=first, shard=(0, 2), **QUIET)
    message = rf"another (oracle|reference) arithmetic \({first}, this run: {then}\)"
    with pytest.raises(InputError, match=message):
        score_dataset(PAIRS, tmp_path, **BOTH, arithmetic=then, shard=(1, 2), **QUIET)
    # `auto` goes on as the store was begun
    score_dataset(PAIRS, tmp_path, **BOTH, arithmetic="auto", shard=(1, 2), **QUIET)
    assert len(parts(tmp_path)) == 5


def test_auto_takes_float32_on_a_cpu_without_bfloat16(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arithmetic, "SplitProducts", None)
    slow = "no bfloat16 instructions here: halves are multiplied in float32, which is slower"
    monkeypatch.setattr(arithmetic, "why_slow", lambda name, device: slow)
    score_dataset(PAIRS, tmp_path / "auto", **BOTH, arithmetic="auto", **QUIET)
    assert "arithmetic: float32; no bfloat16 instructions here" in capsys.readouterr().out
    score_dataset(PAIRS, tmp_path / "plain", **BOTH, **QUIET)
    assert parts(tmp_path / "auto") == parts(tmp_path / "plain")
    manifest = ScoredStore.open(tmp_path / "auto").manifest
    assert manifest["arithmetic_reason"] == slow and manifest["precision_check"] is None


@pytest.fixture
def fast_device(monkeypatch):
    """As if it had the products: they are the same ones, only slower."""
    for module in (arithmetic, products):
        monkeypatch.setattr(module, "why_slow", lambda name, device: None)


def test_auto_compares_and_says_so(tmp_path, capsys, fast_device):
    score_dataset(PAIRS, tmp_path, **BOTH, arithmetic="auto", precision_check=4, **QUIET)
    printed = capsys.readouterr().out
    assert "; on 4 pairs float32 took " in printed
    for name in ("split", "tf32x3"):
        assert f"{name} " in printed and "100.0% at 10%, 100.0% at 30%, 100.0% at 50%" in printed
    manifest = ScoredStore.open(tmp_path).manifest
    assert manifest["arithmetic_reason"].startswith("on 4 pairs float32 took")


@pytest.mark.parametrize(
    ("seconds", "turned", "expected"),
    [
        (dict(float32=3, split=1, tf32x3=2), (), "split"),
        (dict(float32=3, split=2, tf32x3=1), (), "tf32x3"),
        (dict(float32=3, split=1, tf32x3=2), ("split",), "tf32x3"),
        (dict(float32=3, split=1, tf32x3=2), ("split", "tf32x3"), "float32"),
        (dict(float32=1, split=2, tf32x3=2), (), "float32"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_whose_selection_is_the_same(
    tmp_path, monkeypatch, fast_device, seconds, turned, expected
):
    rising = np.arange(20, dtype=np.float32)

    def timed(sample, models, halved, max_tokens):
        name = next(iter(halved.values()), "float32")
        scores = rising[::-1] if name in turned else rising
        return [(scores, scores)] * len(sample), seconds[name]

    monkeypatch.setattr(arithmetic, "_timed", timed)
    score_dataset(PAIRS, tmp_path, **BOTH, arithmetic="auto", **QUIET)
    manifest = ScoredStore.open(tmp_path).manifest
    assert manifest.get("oracle_arithmetic", "float32") == expected
    assert (manifest["precision_check"] or {}).get("arithmetic", "float32") == expected
    assert f"split {seconds['split']} s with " in manifest["arithmetic_reason"]


def test_auto_without_an_oracle(tmp_path, capsys, fast_device):
    score_dataset(PAIRS, tmp_path, reference=REFERENCE, keep=("logp",), arithmetic="auto", **QUIET)
    assert "arithmetic: float32; without an oracle there is no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("models", "how", "message"),
    [
        (BOTH, dict(arithmetic="tf32x3"), "^tf32x3: expected a device that has .* got no tf32"),
        (BOTH, dict(arithmetic="fp8"), "^reference: expected arithmetic auto, float32, .* got fp8"),
        (BOTH, dict(arithmetic="bfloat16"), "^reference: .* expects a bfloat16 model, got float32"),
        (BOTH, dict(arithmetic="auto", precision_check=0), "at least 1 pair to compare, got 0"),
        ("16", dict(arithmetic="auto"), "^reference: arithmetic auto expects a float32 model, got"),
        (
            "16",
            dict(arithmetic="split"),
            "^reference: arithmetic split expects a float32 model, got",
        ),
    ],
    ids=str,
)
def test_refusals(tmp_path, models, how, message, request):
    if models == "16":
        models = dict(reference=tiny_in(torch.bfloat16, 0), oracle=tiny_in(torch.bfloat16, 1))
    if how["arithmetic"] == "auto":
        request.getfixturevalue("fast_device")
    with pytest.raises(InputError, match=message):
        score_dataset(PAIRS, tmp_path / "out", **models, **how, **QUIET)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_bfloat16_are_named_by_row():
    """Not overflow of a half, which can't happen, but a checkpoint that holds an infinity."""
    broken, _ = make_models()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="pair r.*gave the log-probability nan"):
        response_logp(broken, PAIRS, "oracle", 8192, products=SplitProducts(broken, "split"))
