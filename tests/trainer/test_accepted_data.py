"""What SePOTrainer takes for data: token pairs or rows, one set or several by name."""

import pytest
import torch
from tiny import random_scored_pairs, tiny_model, tiny_tokenizer
from tiny_trainer import PAIRS, bare, make_trainer, weights

from sepo import SePOConfig, SePOTrainer
from sepo.errors import InputError
from sepo.masks import load_into
from sepo.trainer.methods import METHODS
from sepo.trainer.metrics import metric_names

datasets = pytest.importorskip("datasets")
Dataset, DatasetDict = datasets.Dataset, datasets.DatasetDict
ROWS = [dict(prompt=f"w{i} w4", chosen="w5 w6", rejected=f"w7 w{i + 20}") for i in range(2, 8)]


def text_trainer(tmp_path, **given):
    args = SePOConfig(
        output_dir=str(tmp_path), method="simpo", use_cpu=True, disable_tqdm=True, max_steps=1
    )
    given = dict(train_dataset=Dataset.from_list(ROWS)) | given
    return SePOTrainer(tiny_model(), args, processing_class=tiny_tokenizer(), **given)


def test_evaluate_takes_rows_as_the_constructor_does(tmp_path):
    rows = Dataset.from_list(ROWS[:3])
    trainer = text_trainer(tmp_path, eval_dataset=rows)
    assert trainer.evaluate(rows) == trainer.evaluate()
    assert trainer.evaluate(rows, metric_key_prefix="test")["test_loss"] > 0


def test_several_sets_are_evaluated_by_name(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_pairs={"a": PAIRS[:3], "b": PAIRS[3:]}, eval_strategy="epoch"
    )
    alone = {name: trainer.evaluate(PAIRS[s]) for name, s in (("a", slice(3)), ("b", slice(3, 13)))}
    found = trainer.evaluate()
    for name, metrics in alone.items():
        for key in metrics.keys() - {"epoch"}:
            assert found.pop(key.replace("eval_", f"eval_{name}_")) == metrics[key]
    assert found.keys() == {"epoch"}
    trainer.train()
    last = {key for entry in trainer.state.log_history for key in entry if entry["step"] == 3}
    assert {"eval_a_loss", "eval_b_loss"} <= last


def test_a_dict_of_rows_and_of_pairs(tmp_path):
    splits = DatasetDict(x=Dataset.from_list(ROWS[:2]), y=Dataset.from_list(ROWS[2:]))
    trainer = text_trainer(tmp_path, eval_dataset=splits)
    whole = trainer.evaluate(Dataset.from_list(ROWS))["eval_loss"]
    parts = trainer.evaluate()
    assert whole == pytest.approx((2 * parts["eval_x_loss"] + 4 * parts["eval_y_loss"]) / 6)


STREAM = Dataset.from_list(ROWS).to_iterable_dataset()


@pytest.mark.parametrize("data", [ROWS, STREAM], ids=["rows", "stream"])
def test_rows_are_read_from_wherever_they_are(tmp_path, data):
    trainer = text_trainer(tmp_path, train_dataset=data)
    expected = text_trainer(tmp_path, train_dataset=Dataset.from_list(ROWS))
    assert trainer.train_pairs.hashes == expected.train_pairs.hashes
    assert trainer.evaluate(data)["eval_loss"] == expected.evaluate(ROWS)["eval_loss"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(PAIRS), "got list_iterator, which has no length"),
        (DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)), "train, test"),
        ({"a": PAIRS}, "got a dict: name one of a"),
        ("pairs.jsonl", "got str, which has no length"),
        (["w1 w2"], "got a list of str"),
        ([], "expected at least one pair, got an empty data set"),
    ],
    ids=["iterator", "splits", "dict", "path", "texts", "nothing"],
)
def test_what_is_not_taken_is_said(tmp_path, data, message):
    with pytest.raises(InputError) as caught:
        text_trainer(tmp_path / "out", train_dataset=data)
    assert message in str(caught.value) and not (tmp_path / "out").exists()
    if not isinstance(data, dict):
        with pytest.raises(InputError) as caught:
            text_trainer(tmp_path / "out").evaluate(data)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(model="M"), "model: expected a model, as sepo.model.load_model loads it, got str"),
        (dict(args=None), "args: expected a SePOConfig, got NoneType"),
        (dict(eval_strategy="epoch"), "--eval_strategy epoch: expected eval_dataset too"),
        (dict(eval_on_start=True), "--eval_on_start: expected eval_dataset too"),
    ],
)
def test_what_else_is_said_before_anything_is_made(tmp_path, given, message):
    flags = {k: v for k, v in given.items() if k not in ("model", "args")}
    args = SePOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **flags)
    with pytest.raises(InputError, match=message):
        SePOTrainer(given.get("model", tiny_model()), given.get("args", args), PAIRS)
    assert not (tmp_path / "out").exists()


def test_predict_is_said_not_to_be():
    with pytest.raises(InputError, match="predict: pairs have no predictions"):
        SePOTrainer.predict(None, PAIRS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_metric_to_choose_by_is_one_that_is_reported(tmp_path, method):
    trainer = make_trainer(tmp_path, method=method)
    found = {f"eval_{name}" for name in metric_names(trainer.method)}
    assert found == trainer.evaluate().keys() - {"epoch"}
    with pytest.raises(InputError, match="--metric_for_best_model: expected loss | "):
        make_trainer(
            tmp_path / "out", method=method, metric_for_best_model="accuracy",
            load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=1,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_best_model_comes_with_its_own_mask(tmp_path):
    trainer = make_trainer(
        tmp_path, method="sparsepo", pairs=bare(random_scored_pairs(13)),
        reference_model=tiny_model(seed=1), mask_learning_rate=0.5, optim="adamw_torch",
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        eval_strategy="steps", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-3"), "expected the last not to be the best"
    found = {name: value.clone() for name, value in trainer.mask.state_dict().items()}
    load_into(trainer.mask, best)
    for name, value in trainer.mask.state_dict().items():
        assert torch.equal(found[name], value)
    saved = type(trainer.model).from_pretrained(best).state_dict()
    kept = {n: w for n, w in weights(trainer).items() if "sparse_mask" not in n}
    assert all(torch.equal(weight, saved[name]) for name, weight in kept.items())


class Switching(torch.optim.SGD):
    """As schedule-free optimisers are: it refuses a step outside its training mode."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train"
        return super().step(closure)


def test_an_optimizer_is_told_to_train_and_to_evaluate(tmp_path):
    model, modes = tiny_model(), []
    optimizer = Switching(model.parameters(), lr=0.1)
    args = SePOConfig(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, pairs_per_step=5,
        eval_strategy="steps", save_strategy="no",
    )  # fmt: skip
    trainer = SePOTrainer(model, args, PAIRS, PAIRS[:3], optimizers=(optimizer, None))
    losses = trainer._losses
    trainer._losses = lambda *given: modes.append(optimizer.mode) or losses(*given)
    trainer.train()
    assert modes == ["train", "eval"] * 3
