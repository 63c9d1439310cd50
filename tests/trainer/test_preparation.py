"""A model is prepared once a run, compared with itself once, where it runs, before its data."""

import pytest
import torch
from scoring_for_tests import TOKENIZER, make_pairs
from tiny import random_scored_pairs, tiny_model
from tiny_trainer import PAIRS, bare, make_trainer
from training_run import make_run, write_store

from sepo import train
from sepo.errors import InputError
from sepo.model import prepare
from sepo.model.load import load_model
from sepo.score.score import score_dataset
from sepo.trainer import fused

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def counts(monkeypatch) -> dict[str, list]:
    """What is prepared, and which attention of what is compared."""
    seen = {"prepared": [], "compared": []}
    bind, check = prepare.forward_of, prepare._check_against_itself
    monkeypatch.setattr(
        prepare, "forward_of", lambda cls: seen["prepared"].append(cls) or bind(cls)
    )
    monkeypatch.setattr(
        prepare,
        "_check_against_itself",
        lambda model, name: seen["compared"].append(name) or check(model, name),
    )
    return seen


RUNS = {
    "sepo": (dict(), 1),
    "tdpo2, live by path": (dict(method="tdpo2"), 2),
    "sparsepo, live by path": (dict(method="sparsepo"), 2),
    "dpo, live by path": (dict(method="dpo"), 2),
    "dpo, LoRA": (dict(method="dpo", use_peft=True), 1),
    "tdpo2, LoRA": (dict(method="tdpo2", use_peft=True), 1),
}


@pytest.mark.parametrize(("arguments", "models"), RUNS.values(), ids=RUNS)
def test_once_a_model_of_a_run(tmp_path, counts, arguments, models):
    if arguments.get("use_peft"):
        pytest.importorskip("peft")
    given = make_run(tmp_path, max_steps=2, dataset_name=str(tmp_path / "scores"), **arguments)
    write_store(tmp_path / "scores", random_scored_pairs(8), keep=["score"])
    train.main([*given, "--output_dir", str(tmp_path / "out")])
    assert [len(seen) for seen in counts.values()] == [models, models]


def test_once_a_model_in_python(tmp_path, counts):
    make_trainer(tmp_path, method="tdpo2", pairs=bare(PAIRS), reference_model=tiny_model()).train()
    assert [len(seen) for seen in counts.values()] == [2, 2]


def test_once_a_model_that_scores(tmp_path, counts):
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / str(seed))
    score_dataset(
        make_pairs(), tmp_path / "store", reference=load_model(str(tmp_path / "0")),
        oracle=load_model(str(tmp_path / "1")), tokenizer=TOKENIZER, pairs_per_part=4,
        progress=False,
    )  # fmt: skip
    assert [len(seen) for seen in counts.values()] == [2, 2]


def test_a_model_that_is_not_served_costs_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr("sepo.trainer.trainer.PreparedPairs", lambda *_, **__: pytest.fail("read"))
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.01)
    with pytest.raises(InputError, match="differ from its own by"):
        make_trainer(tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "moves"),
    [
        (dict(), True),
        (dict(fsdp="full_shard"), False),
        (dict(deepspeed="zero.json"), False),
        (dict(bf16_full_eval=True), False),
        (dict(place_model_on_device=False), False),
    ],
    ids=str,
)
def test_where_a_policy_is_prepared(args, moves):
    """Where Trainer will put it; what is sharded when training starts stays until then."""
    usual = dict.fromkeys(("fsdp", "deepspeed", "fp16_full_eval", "bf16_full_eval"))
    usual |= dict(place_model_on_device=None, device=torch.device("meta"), fused_layers="none")
    settings = type("Args", (), usual | dict(attn_impl="auto") | args)
    model = tiny_model()
    fused.place_and_prepare(model, settings)
    assert model.device.type == ("meta" if moves else "cpu")
    fused.place_and_prepare(reference := tiny_model(), settings, policy=False)
    assert reference.device.type == "meta"
