"""What two models share is held once: a folder that both name, the base that an adapter is on."""

import numpy as np
import pytest
import torch
from model_folders import IDS, save_adapter
from scoring_for_tests import make_pairs

from sepo.model.budget import scoring_budget
from sepo.model.fingerprint import checkpoint_hash, weights_hash
from sepo.model.folder import find_folder
from sepo.model.load import load_model
from sepo.model.sharing import Wanted, load_sharing
from sepo.score.products import SplitProducts
from sepo.score.score import score_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
PAIRS = make_pairs(4)


def wanted(*paths, dtypes=(torch.float32, torch.float32)):
    folders = [find_folder(str(path)) for path in paths]
    named = zip(("reference", "oracle"), folders, dtypes, strict=True)
    return {role: Wanted(folder, dtype, "cpu") for role, folder, dtype in named}


def tensors(model):
    return {p.data_ptr() for p in model.parameters()}


def scores(reference, oracle, **options):
    found = score_pairs(PAIRS, reference, oracle, **options)
    return np.concatenate([s for p in found for s in (p.chosen_score, p.rejected_score)])


def test_an_adapter_lies_beside_its_base(base, tmp_path, capsys):
    sft = tmp_path / "sft"
    save_adapter(sft, base, target_modules="all-linear", r=4, lora_alpha=24)
    both = load_sharing(wanted(base, sft))
    assert f"oracle: its adapter is added in each pass, not merged: {base} is held" in (
        capsys.readouterr().out
    )
    reference, oracle = both.values()
    alone, merged = load_model(str(base)), load_model(str(sft))
    own = tensors(oracle) - tensors(reference)
    assert tensors(reference) < tensors(oracle) and len(own) == 2 * 14  # A and B of each layer
    found = scores(**both)
    np.testing.assert_allclose(found, scores(alone, merged), atol=1e-4)
    assert np.abs(found).max() > 0.1
    ref_logp = lambda model: score_pairs(PAIRS, model, keep=["logp"])[0].chosen_ref_logp
    assert np.array_equal(ref_logp(reference), ref_logp(alone))  # no adapter in it
    assert weights_hash(oracle) == checkpoint_hash(str(sft)) and oracle.name_or_path == str(sft)
    assert weights_hash(reference) == checkpoint_hash(str(base))
    products = {"reference": SplitProducts(reference, "split")}
    products["oracle"] = SplitProducts(oracle, "split", products.values())
    weight = reference.lm_head.weight
    assert all(p._halves[weight] is products["oracle"]._halves[weight] for p in products.values())
    np.testing.assert_allclose(scores(**both, products=products), found, atol=1e-3)


def test_a_folder_that_both_name_is_one_model(base, tmp_path, capsys):
    both = load_sharing(wanted(base, tmp_path / "base" / ".." / "base"))
    assert both["reference"] is both["oracle"]
    assert "oracle: " in (said := capsys.readouterr().out) and "is loaded once" in said
    short = load_sharing(wanted(base, base, dtypes=(torch.float32, torch.bfloat16)))
    assert not tensors(short["reference"]) & tensors(short["oracle"])


def test_two_adapters_on_a_base(base, tmp_path):
    for name, seed in (("sft", 1), ("dpo", 2)):
        save_adapter(tmp_path / name, base, seed=seed)
    both = load_sharing(wanted(tmp_path / "sft", tmp_path / "dpo"))
    shared = tensors(both["reference"]) & tensors(both["oracle"])
    assert len(shared) == len(list(load_model(str(base)).parameters()))
    merged = [load_model(str(tmp_path / name)) for name in ("sft", "dpo")]
    np.testing.assert_allclose(scores(**both), scores(*merged), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [dict(use_dora=True), dict(modules_to_save=["norm"]), dict(target_modules=["embed_tokens"])],
    ids=str,
)
def test_what_more_than_adds_is_merged(base, tmp_path, options):
    save_adapter(tmp_path / "sft", base, **options)
    both = load_sharing(wanted(base, tmp_path / "sft"))
    expected = load_model(str(tmp_path / "sft"))
    assert not tensors(both["reference"]) & tensors(both["oracle"])
    assert torch.equal(both["oracle"](input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert torch.equal(both["reference"](IDS).logits, load_model(str(base))(IDS).logits)


def test_the_budget_counts_what_is_shared_once(base, tmp_path, monkeypatch):
    save_adapter(tmp_path / "sft", base)
    both = load_sharing(wanted(base, tmp_path / "sft"))
    monkeypatch.setattr("sepo.model.budget.device_memory", lambda device: 80 << 30)
    held = []
    words = lambda tokens, memory, stays, a_token: held.append(stays) or ""
    monkeypatch.setattr("sepo.model.budget.in_words", words)
    scoring_budget(both, 4)
    assert set(held) == {sum(p.nbytes for p in both["oracle"].parameters())}
