"""Which reference a method's step reads, what it refuses, and that adapters may be its absence."""

from dataclasses import replace

import pytest
import torch
from scoring_for_tests import TOKENIZER, make_pairs
from tiny import V, tiny_model
from tiny_trainer import PAIRS, bare, make_trainer, weights

from sepo import SePOConfig, SePOTrainer
from sepo.data.hidden import StoredHead
from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.model.reference import (
    CachedReference,
    LiveReference,
    ReferenceFolder,
    resolve_reference,
)
from sepo.score.score import score_dataset
from sepo.trainer.methods import METHODS

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
NEEDS = {
    needed: sorted(name for name, method in METHODS.items() if method.reference == needed)
    for needed in (None, "logp", "hidden", "layers")
}
LARGER = dict(vocab_size=V + 3)


@pytest.fixture(scope="module")
def policy():
    return prepare_model(tiny_model())


@pytest.fixture(scope="module")
def live():
    return prepare_model(tiny_model("gpt_neox", hidden_size=48, seed=1))


@pytest.fixture(scope="module")
def folder(live, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    live.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stores(live, tmp_path_factory):
    path, found = tmp_path_factory.mktemp("stores"), {}
    larger = prepare_model(tiny_model(seed=1, **LARGER))
    for name, reference, keep in (
        ("logp", live, ("logp",)),
        ("hidden", live, ("logp", "hidden")),
        ("larger", larger, ("hidden",)),
    ):
        how = dict(reference=reference, keep=keep, tokenizer=TOKENIZER, progress=False)
        score_dataset(make_pairs(), path / name, precision_check=0, **how)
        found[name] = ScoredStore.open(path / name, TOKENIZER)
    return found


def find(name, model, given=None, data=None):
    data = make_pairs() if data is None else data
    return resolve_reference(METHODS[name].reference, given, model, data, method=name)


def with_adapters(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    return prepare_model(peft.get_peft_model(tiny_model(), config))


def test_every_kind_is_tested():
    assert NEEDS == {
        None: ["confpo", "rrhf", "sepo", "sepo-entropy", "sepo-rand", "sft", "simpo"],
        "logp": ["dpo", "dpop", "ipo", "selective-dpo"],
        "hidden": ["tdpo1", "tdpo2"],
        "layers": ["mapo", "sparsepo"],
    }


# what the method needs, what is given, which data, whether the policy has adapters; the reference:
# "live" is the model that is given or loaded, "policy" the policy without its adapters
CASES = [
    (None, None, "pairs", False, None),
    (None, "model", "hidden", False, None),
    (None, "folder", "hidden", True, None),
    ("logp", "model", "hidden", False, "live"),
    ("hidden", "model", "hidden", True, "live"),
    ("layers", "model", "pairs", True, "live"),
    ("logp", "live", "pairs", False, "live"),
    ("layers", "live", "hidden", True, "live"),
    ("logp", "itself", "pairs", True, "policy"),
    ("layers", "itself", "pairs", True, "policy"),
    ("hidden", "cached", "pairs", False, "cached rows"),
    ("hidden", "cached", "pairs", True, "cached rows"),
    ("logp", "folder", "logp", False, "cached"),
    ("logp", "folder", "pairs", False, "live"),
    ("hidden", "folder", "hidden", False, "cached rows"),
    ("hidden", "folder", "logp", False, "live"),
    ("hidden", "folder and more data", "hidden", False, "live"),
    ("layers", "folder", "hidden", False, "live"),
    ("logp", "folder, adapters stand in", "logp", True, "cached"),
    ("hidden", "folder, adapters stand in", "hidden", True, "cached rows"),
    ("hidden", "folder, adapters stand in", "logp", True, "policy"),
    ("layers", "folder, adapters stand in", "hidden", True, "policy"),
    ("logp", None, "logp", False, None),
    ("logp", None, "evaluation alone", False, None),
    ("logp", None, "logp", True, "policy"),
    ("hidden", None, "hidden", False, "cached rows"),
    ("hidden", None, "hidden", True, "cached rows"),  # scored once, they cost less than a pass
    ("hidden", None, "logp", True, "policy"),
    ("layers", None, "hidden", True, "policy"),
]


@pytest.mark.parametrize(("needed", "given", "data", "adapters", "expected"), CASES)
def test_which_reference(needed, given, data, adapters, expected, policy, live, folder, stores):
    model = with_adapters() if adapters else policy
    pairs = {"pairs": make_pairs(), "evaluation alone": None}.get(data, stores.get(data))
    by_path = ReferenceFolder(str(folder), {data: pairs}, TOKENIZER)
    given = {
        None: None,
        "model": live,
        "live": LiveReference(live),
        "itself": LiveReference(model, without_adapters=True),
        "cached": CachedReference(stores["hidden"].reference_head()),
        "folder": by_path,
        "folder and more data": replace(by_path, data={data: pairs, "more": make_pairs()}),
        "folder, adapters stand in": replace(by_path, adapters_stand_in=True),
    }[given]
    found = resolve_reference(needed, given, model, pairs, method="M")
    if expected is None:
        assert found is None
    elif expected == "policy":
        assert found == LiveReference(model, without_adapters=True)
    elif expected == "live":
        assert isinstance(found, LiveReference) and not found.without_adapters
        assert found.model is live or isinstance(given, ReferenceFolder)
        assert not found.model.training and not any(
            p.requires_grad for p in found.model.parameters()
        )
        assert same_weights(found.model, live)
    else:
        assert isinstance(found, CachedReference)
        assert (found.stored is not None) == (expected == "cached rows")
        if expected == "cached rows":
            assert torch.equal(found.stored.weight, live.get_output_embeddings().weight)
    if isinstance(given, LiveReference | CachedReference) and expected != "policy" and needed:
        assert found is given


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", NEEDS["logp"] + NEEDS["hidden"] + NEEDS["layers"])
def test_adapters_switched_off_are_the_reference(name):
    model = with_adapters()
    assert find(name, model) == LiveReference(model, without_adapters=True)


REFUSED = [
    ("dpo", None, None, r"needs a reference: pairs with cached log-probabilities \(`sepo score "
     "--keep logp`\\), or reference_model="),
    ("ipo", None, None, "--method ipo needs a reference: pairs with cached log-probabilities"),
    ("dpop", None, None, "--method dpop needs a reference: pairs with cached log-probabilities"),
    ("tdpo1", None, None, r"--method tdpo1 needs a reference: a store with cached states \(`sepo "
     "score --keep hidden`\\), or reference_model="),
    ("tdpo2", None, "logp", "--method tdpo2 needs a reference: a store with cached states"),
    ("sparsepo", None, None, "--method sparsepo needs a reference: reference_model="),
    ("mapo", None, "hidden", "--method mapo needs a reference: reference_model="),
    ("sparsepo", "cached", None, "--method sparsepo: expected a live reference, whose layers its "
     "mask reads, got cached rows"),
    ("mapo", "cached", None, "--method mapo: expected a live reference"),
    ("tdpo1", "larger", None, "reference: expected the policy's vocabulary, 61, got 64"),
    ("tdpo2", None, "larger", "reference: expected the policy's vocabulary, 61, got 64"),
    ("sparsepo", "larger", None, "reference: expected the policy's vocabulary, 61, got 64"),
    ("mapo", "larger", None, "reference: expected the policy's vocabulary, 61, got 64"),
    ("tdpo1", "capped", None, "reference: expected the policy's logit soft cap, None, got 30.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "data", "message"), REFUSED)
def test_a_reference_that_cannot_serve(tmp_path, stores, name, given, data, message):
    """One line, before the run leaves a trace."""
    given = {
        None: lambda: None,
        "cached": lambda: CachedReference(stores["hidden"].reference_head()),
        "larger": lambda: tiny_model(seed=1, **LARGER),
        "capped": lambda: CachedReference(StoredHead(torch.zeros(V, 8), None, 1.0, 30.0)),
    }[given]()
    pairs = make_pairs() if data is None else stores[data]
    with pytest.raises(InputError, match=message) as error:
        trainer(tmp_path / "out", pairs, given, method=name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def trainer(path, pairs, reference, **args):
    config = SePOConfig(
        output_dir=str(path), use_cpu=True, disable_tqdm=True, save_strategy="no", **args
    )
    return SePOTrainer(tiny_model(), config, pairs, reference_model=reference)


@pytest.mark.parametrize("name", ["ipo"])
def test_another_vocabulary_is_no_obstacle_to_log_probabilities(tmp_path, name):
    """They are of the same tokens; what other tokens the reference knows is not compared."""
    larger = tiny_model(seed=1, **LARGER)
    made = trainer(tmp_path, make_pairs(), larger, method=name)
    made.train()
    assert made.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("name", ["tdpo2"])
def test_a_run_on_cached_rows_loads_no_reference(tmp_path, stores, name):
    """What is trained is that of the live reference, up to the rounding of its states."""
    found, after = {}, {}
    descent = dict(
        learning_rate=0.05, optim="sgd", max_grad_norm=0.0, warmup_steps=0, pairs_per_step=5
    )
    for kind, reference in (
        ("cached", None),
        ("live", tiny_model("gpt_neox", hidden_size=48, seed=1)),
    ):
        path = tmp_path / kind
        made = trainer(path, stores["hidden"], reference, method=name, beta=0.5, **descent)
        made.train()
        found[kind], after[kind] = made.state.log_history[0], weights(made)
        assert isinstance(made.reference, CachedReference) == (kind == "cached")
    for metric in ("loss", "rewards/margins", "kl"):
        assert found["cached"][metric] == pytest.approx(found["live"][metric], abs=5e-3)
    before = dict(tiny_model().named_parameters())
    for parameter, expected in after["live"].items():
        moved = (expected - before[parameter]).norm()
        assert (after["cached"][parameter] - expected).norm() < 0.05 * moved, parameter


@pytest.mark.parametrize("name", NEEDS["hidden"] + NEEDS["layers"])
def test_adapters_switched_off_equal_a_frozen_copy(tmp_path, name):
    """After a step the policy is elsewhere; the reference is where it was."""
    peft = pytest.importorskip("peft")
    made = []
    for reference in (None, tiny_model()):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        run = make_trainer(
            tmp_path, pairs=bare(PAIRS[:6]), eval_pairs=bare(PAIRS[:6]), method=name,
            pairs_per_step=3, warmup_steps=0,
            peft_config=config, reference_model=reference, independent_masks=name == "sparsepo",
        )  # fmt: skip
        assert run.reference.without_adapters == (reference is None)
        if run.mask is not None:  # at its initial size nearly shut
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for part in (run.mask.reward, run.mask.kl):
                    part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
                    part.mixer.fill_(0.5)
        before = weights(run)
        run.train()
        made.append(run)
    alone, beside = made
    for parameter, expected in weights(beside).items():
        assert torch.equal(weights(alone)[parameter], expected), parameter
        trained = "lora_" in parameter or "sparse_mask" in parameter
        # the mask's LayerNorm and its biases move too
        assert torch.equal(before[parameter], expected) != trained, parameter
    metrics, expected = alone.evaluate(), beside.evaluate()
    for metric in ("eval_loss", "eval_rewards/margins", "eval_kl"):
        assert metrics[metric] == expected[metric] != 0
