"""A patched model's loss of labels is its own, gradients too; a Trainer's run stays the same run."""

import copy

import pytest
import torch
from tiny import V, tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from sepo import ops, patch
from sepo.errors import InputError

IDS = torch.tensor([[3, 4, 5, 6, 9], [7, 8, 9, 1, 2]])
LABELS = torch.tensor([[-100, -100, 5, 6, -100], [-100, 8, -100, 1, 2]])
TINY = {
    "llama": {},
    "qwen2": {},
    "gemma2": dict(final_logit_softcapping=2.0),
    "gpt_neox": dict(hidden_dropout=0.0),
    "gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "phi": {},  # a bias on the head
    "granite": dict(logits_scaling=4.0),
    "cohere": dict(logit_scale=0.5),
}


def twins(arch: str = "llama", **more):
    model = tiny_model(arch, **TINY.get(arch, {}), **more).train()
    if arch == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model, copy.deepcopy(model)


def loss_and_gradients(model, **inputs):
    output = model(**inputs)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, found


def assert_same(found, expected):
    (output, gradients), (own, theirs) = found, expected
    assert output.loss.dtype == own.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, own.loss, rtol=2e-6, atol=0)
    size = max(g.abs().max().item() for g in theirs.values())
    assert size > 1e-3
    torch.testing.assert_close(gradients, theirs, rtol=1e-5, atol=2e-6 * size)


@pytest.fixture
def spy(monkeypatch):
    """How many rows go through our head, call by call."""
    seen, called = [], ops.selected_logprob
    count = lambda hidden, weight, rows, *args, **how: (
        seen.append(len(rows)) or called(hidden, weight, rows, *args, **how)
    )
    monkeypatch.setattr(ops, "selected_logprob", count)
    return seen


@pytest.mark.parametrize("arch", TINY)
def test_the_models_own_loss(arch, spy):
    own, ours = twins(arch)
    expected = loss_and_gradients(own, input_ids=IDS, labels=LABELS)
    with patch.transformers(ours):
        spy.clear()
        found = loss_and_gradients(ours, input_ids=IDS, labels=LABELS)
        assert spy == [5] and found[0].logits is None
    assert_same(found, expected)
    assert loss_and_gradients(ours, input_ids=IDS, labels=LABELS)[0].logits is not None


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
KWARGS = {
    "a sum over tokens elsewhere too": dict(labels=LABELS, num_items_in_batch=torch.tensor(9)),
    "a plain number": dict(labels=LABELS, num_items_in_batch=9),
    "another index": dict(labels=LABELS.masked_fill(LABELS < 0, 0), ignore_index=0),
    "shifted already": dict(labels=LABELS, shift_labels=LABELS),
    "a mask": dict(labels=LABELS, attention_mask=MASK),
    "positions": dict(labels=LABELS, position_ids=torch.arange(5)[None] + 3),
    "states": dict(labels=LABELS, output_hidden_states=True),
}


@pytest.mark.parametrize("case", KWARGS)
def test_the_models_own_arguments(case, spy):
    own, ours = twins()
    expected = loss_and_gradients(own, input_ids=IDS, **KWARGS[case])
    patch.transformers(ours)
    spy.clear()
    found = loss_and_gradients(ours, input_ids=IDS, **KWARGS[case])
    assert len(spy) == 1
    assert_same(found, expected)
    states = expected[0].hidden_states
    torch.testing.assert_close(found[0].hidden_states, states)
    assert (states is None) == (case != "states")


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_under_autocast_it_is_no_further_from_float32(arch):
    own, ours = twins(arch)
    truth = loss_and_gradients(own, input_ids=IDS, labels=LABELS)
    patch.transformers(ours)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = (loss_and_gradients(m, input_ids=IDS, labels=LABELS) for m in (ours, own))
    distance = lambda run: (
        sum(((run[1][name] - g) ** 2).sum().item() for name, g in truth[1].items()) ** 0.5
    )
    assert 0 < distance(found) <= 1.1 * distance(theirs)


def test_arguments_without_names(spy):
    own, ours = twins()
    given = (IDS, MASK, None, None, None, LABELS)
    patch.transformers(ours)
    spy.clear()
    torch.testing.assert_close(ours(*given).loss, own(*given).loss, rtol=2e-6, atol=0)
    assert len(spy) == 1


def test_embeddings_instead_of_tokens(spy):
    own, ours = twins()
    given = dict(inputs_embeds=torch.randn(2, 5, 32), labels=LABELS)
    patch.transformers(ours)
    spy.clear()
    torch.testing.assert_close(ours(**given).loss, own(**given).loss, rtol=2e-6, atol=0)
    assert len(spy) == 1


def test_a_batch_without_a_label():
    own, ours = twins()
    patch.transformers(ours)
    none = torch.full_like(LABELS, -100)
    assert own(IDS, labels=none).loss.isnan() and ours(IDS, labels=none).loss.isnan()
    found = loss_and_gradients(ours, input_ids=IDS, labels=none, num_items_in_batch=7)
    assert found[0].loss == 0 and not any(g.any() for g in found[1].values())


def sharper(logits, labels, vocab_size, **kwargs):
    return torch.nn.functional.cross_entropy(
        2 * logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )


OWN = {
    "no labels": {},
    "a cache": dict(labels=LABELS, use_cache=True),
    "a tuple": dict(labels=LABELS, return_dict=False),
    "some logits": dict(labels=LABELS, logits_to_keep=torch.arange(5)),
    "all logits": dict(labels=LABELS, skip_logits=False),
}


@pytest.mark.parametrize("case", OWN)
def test_what_is_left_to_the_model(case, spy):
    """Bit for bit: nothing of ours runs."""
    own, ours = twins()
    patch.transformers(ours)
    spy.clear()
    theirs = {name: value for name, value in OWN[case].items() if name != "skip_logits"}
    found, expected = ours(IDS, **OWN[case]), own(IDS, **theirs)
    for value, wanted in zip(tuple(found)[:2], tuple(expected)[:2], strict=True):
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(value, wanted)
    assert not spy


def test_a_loss_that_is_not_transformers(spy):
    own, ours = twins()
    patch.transformers(ours)
    own.loss_function = ours.loss_function = sharper
    spy.clear()
    assert torch.equal(ours(IDS, labels=IDS).loss, own(IDS, labels=IDS).loss)
    assert not spy


def test_a_router_adds_its_loss(spy):
    own, ours = twins("mixtral", num_local_experts=4, router_jitter_noise=0.0)
    patch.transformers(ours)
    spy.clear()
    assert torch.equal(
        ours(IDS, labels=LABELS, output_router_logits=True).loss,
        own(IDS, labels=LABELS, output_router_logits=True).loss,
    )
    assert not spy
    found, expected = (loss_and_gradients(m, input_ids=IDS, labels=LABELS) for m in (ours, own))
    assert_same(found, expected)
    assert len(spy) == 1


def test_evaluation_has_its_logits(spy):
    own, ours = (model.eval() for model in twins())
    patch.transformers(ours)
    spy.clear()
    found = ours(IDS, labels=LABELS)
    assert torch.equal(found.logits, own(IDS).logits) and not spy
    alone = ours(IDS, labels=LABELS, skip_logits=True)
    assert alone.logits is None and len(spy) == 1
    torch.testing.assert_close(alone.loss, found.loss, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's
def test_adapters_in_the_trunk(spy):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    own, ours = (get_peft_model(m, config) for m in twins("qwen2"))
    ours.load_state_dict(own.state_dict())
    patch.transformers(ours)
    spy.clear()
    expected = loss_and_gradients(own, input_ids=IDS, labels=LABELS)
    assert_same(loss_and_gradients(ours, input_ids=IDS, labels=LABELS), expected)
    assert len(spy) == 1 and all("lora" in name for name in expected[1])


# --- transformers' Trainer, as it is -------------------------------------------------------------


class Gradients(TrainerCallback):
    """Those of every step, as the optimiser gets them."""

    def __init__(self):
        self.of_steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of_steps.append({n: p.grad.clone() for n, p in model.named_parameters()})


def rows():  # of several lengths, so that means over batches are no mean over tokens
    return [
        {"input_ids": list(range(3, 5 + n)), "labels": [-100, *range(4, 5 + n)]}
        for n in (1, 6, 2, 9, 4, 3, 8, 5)
    ]


def collate(examples):
    pad = lambda name, value: pad_sequence(
        [torch.tensor(row[name]) for row in examples], batch_first=True, padding_value=value
    )
    return dict(input_ids=pad("input_ids", 1), labels=pad("labels", -100))


def train(path, model, patched, **more):
    seen = Gradients()
    arguments = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2,
        logging_steps=1, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(str(path), **(arguments | more)),
        train_dataset=rows(),
        eval_dataset=rows()[:3],
        data_collator=collate,
        callbacks=[seen],
    )
    if patched:
        with patch.transformers(model):
            trainer.train()
    else:
        trainer.train()
    log = [{k: v for k, v in line.items() if "second" not in k and "time" not in k}
           for line in trainer.state.log_history]  # fmt: skip
    return log, seen.of_steps


RUNS = {
    "accumulated": {},
    "a mean a batch": dict(average_tokens_across_devices=False),
    "checkpointed": dict(gradient_checkpointing=True),
    "evaluated": dict(eval_strategy="steps", eval_steps=2),
    "smoothed": dict(label_smoothing_factor=0.1),  # which takes the model's own logits
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_transformers_trainer(tmp_path, arch, case, spy):
    own, ours = twins(arch)
    log, gradients = train(tmp_path, own, False, **RUNS[case])
    spy.clear()
    log_here, gradients_here = train(tmp_path, ours, True, **RUNS[case])
    through_ours = spy[1:]  # the first compares the model with itself
    assert len(through_ours) == (0 if case == "smoothed" else 8)
    assert len(log) == len(log_here) and len(gradients) == 4
    for line, expected in zip(log_here, log, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    for found, theirs in zip(gradients_here, gradients, strict=True):
        size = max(g.abs().max().item() for g in theirs.values())
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5 * size)


# --- beside Liger's fused cross entropy ----------------------------------------------------------


def give_to_liger(model):
    from types import MethodType

    forward = pytest.importorskip("liger_kernel.transformers.model.llama").lce_forward
    model.forward = MethodType(forward, model)


def test_ligers_head_before_ours_is_refused():
    model = tiny_model()
    give_to_liger(model)
    with pytest.raises(InputError, match=r"^LlamaForCausalLM is not supported: expected no other"):
        patch.transformers(model)


def test_ligers_head_after_ours_is_refused():
    """`use_liger_kernel=True` puts it there when training starts, and says nothing."""
    model = tiny_model().train()
    applied = patch.transformers(model)
    ours = model.forward
    give_to_liger(model)
    message = r"^LlamaForCausalLM is patched no more: .* liger_kernel_config=.*False}$"
    with pytest.raises(InputError, match=message):
        model(IDS, labels=LABELS)
    model.forward = ours
    applied.undo()
    give_to_liger(model)
    assert not model._forward_pre_hooks


def test_a_label_out_of_range():
    model = tiny_model().train()
    patch.transformers(model)
    with pytest.raises(ValueError, match=f"expected 0 <= targets < {V}, got {V}"):
        model(IDS, labels=LABELS.masked_fill(LABELS == 8, V))
