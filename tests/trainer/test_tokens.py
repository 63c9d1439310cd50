"""Which reference a method's step reads, what it refuses, and that adapters may be its absence."""

import pytest
import torch
from scoring_for_tests import TOKENIZER, make_pairs
from test_trainer import PAIRS, bare, make_trainer, weights
from tiny import V, tiny_model

from sepo import SePOConfig, SePOTrainer
from sepo.data.hidden import StoredHead
from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.model.reference import CachedReference, LiveReference
from sepo.score.score import score_dataset
from sepo.trainer.methods import METHODS
from sepo.trainer.step import find_reference

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
    return find_reference(METHODS[name], name, model, given, data)


def with_adapters(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    return prepare_model(peft.get_peft_model(tiny_model(), config))


def test_every_kind_is_tested():
    assert NEEDS == {
        None: ["rrhf", "sepo", "sepo-rand", "sft", "simpo"],
        "logp": ["dpo", "dpop", "ipo"],
        "hidden": ["tdpo1", "tdpo2"],
        "layers": ["mapo", "sparsepo"],
    }


@pytest.mark.parametrize("name", NEEDS[None])
def test_a_method_without_a_reference_takes_none(name, policy, live, stores):
    assert find(name, policy) is find(name, policy, live, stores["hidden"]) is None
    assert find(name, with_adapters()) is None


@pytest.mark.parametrize("name", NEEDS["logp"] + NEEDS["hidden"] + NEEDS["layers"])
def test_a_model_that_is_given_is_the_reference(name, policy, live, stores):
    for model in (policy, with_adapters()):
        for data in (make_pairs(), stores["hidden"]):
            assert find(name, model, live, data) == LiveReference(live)
    wrapped = LiveReference(live)
    assert find(name, policy, wrapped) is wrapped


@pytest.mark.parametrize("name", NEEDS["logp"])
def test_log_probabilities_of_the_data_need_no_model(name, policy, stores):
    assert find(name, policy, data=stores["logp"]) is None
    assert find(name, policy, data=PAIRS) is None
    # evaluation alone has no training data to look at
    assert find_reference(METHODS[name], name, policy, None, None) is None


@pytest.mark.parametrize("name", NEEDS["hidden"])
def test_hidden_rows_of_the_data_need_no_model(name, policy, live, stores):
    for model in (policy, with_adapters()):  # scored once, they cost less than another pass
        found = find(name, model, data=stores["hidden"])
        assert isinstance(found, CachedReference)
        assert torch.equal(found.stored.weight, live.get_output_embeddings().weight)
    assert find(name, policy, found) is found


@pytest.mark.parametrize("name", NEEDS["logp"] + NEEDS["hidden"] + NEEDS["layers"])
def test_adapters_switched_off_are_the_reference(name):
    model = with_adapters()
    found = find(name, model)
    assert found == LiveReference(model, without_adapters=True)


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
