"""The policy before its first step: it is its reference, and has every token; after its last: a model."""

import numpy as np
import peft
import pytest
import torch
from model_folders import save_adapter, untied
from tiny import V, tiny_model
from tiny_trainer import PAIRS, bare, make_trainer
from transformers import AutoModelForCausalLM

from sepo.data import TokenPair
from sepo.errors import InputError
from sepo.model.load import load_model
from sepo.model.prepare import prepare_model
from sepo.model.reference import LiveReference
from sepo.score.score import score_pairs

pytestmark = [
    # peft 0.21 asks transformers 5.23 by an old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


def lora(**more):
    options = dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    return peft.LoraConfig(**options | more)


def adapted(model=None, *, size=0.1, **more):
    """A PeftModel whose adapters were trained before."""
    model = peft.get_peft_model(tiny_model() if model is None else model, lora(**more))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return model


def start(tmp_path, model, **more):
    return make_trainer(tmp_path / "out", model=model, method="dpo", pairs=bare(PAIRS), **more)


@pytest.mark.parametrize(
    "make",
    [
        adapted,
        lambda: adapted(size=0.002),
        lambda: adapted(tiny_model(dtype=torch.bfloat16)),
        lambda: adapted(use_dora=True),
        lambda: adapted(untied(), size=0, modules_to_save=["embed_tokens"]).requires_grad_(True),
    ],
    ids=["lora", "little", "bfloat16", "dora", "embedding"],
)
@pytest.mark.parametrize("method", ["dpo", "tdpo1"])
def test_a_policy_that_is_not_its_reference_is_refused(tmp_path, make, method):
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
    with pytest.raises(InputError, match=r"adapters change its log-probabilities by .* expected"):
        make_trainer(
            tmp_path / "out", model=model, method=method, pairs=bare(PAIRS), peft_config=None,
            reference_model=None if method == "dpo" else LiveReference(model, True),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_base_that_new_adapters_change_is_refused(tmp_path):
    """PiSSA moves part of the weights into the adapter: without it the model is not what it was."""
    with pytest.raises(InputError, match="adapters change its log-probabilities"):
        start(tmp_path, tiny_model(), peft_config=lora(init_lora_weights="pissa"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, dict(use_dora=True), dict(lora_dropout=0.5)], ids=str)
def test_new_adapters_start_at_the_reference(tmp_path, dtype, more):
    trainer = start(tmp_path, tiny_model(dtype=dtype), peft_config=lora(**more))
    assert trainer.reference.without_adapters


def test_a_reference_that_was_asked_for_may_differ(tmp_path):
    trainer = start(tmp_path, adapted(), reference_model=tiny_model())
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - np.log(2)) > 0.01
    cached = score_pairs(bare(PAIRS), prepare_model(tiny_model(seed=1)), keep=["logp"])
    make_trainer(tmp_path / "b", model=adapted(), method="dpo", pairs=cached)


def test_merged_adapters_are_the_reference(tmp_path):
    """What the message says, done: the loss starts at ln 2, the policy where it was."""
    trainer = start(tmp_path, adapted().merge_and_unload(), peft_config=lora())
    pairs = [PAIRS[i] for i in trainer._plan(trainer.train_pairs, 5, step=0).pairs]
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    before = score_pairs(bare(pairs), prepare_model(adapted()), keep=["logp"])
    expected = np.mean([pair.chosen_ref_logp.sum() for pair in before])
    assert first["logps/chosen"] == pytest.approx(expected, abs=1e-4)


def test_adapters_upon_adapters_are_refused(tmp_path):
    with pytest.raises(InputError, match="peft_config: expected a model without adapters, got one"):
        start(tmp_path, adapted(), peft_config=lora())


@pytest.mark.parametrize("new", [False, True])
def test_an_adapter_that_transformers_loaded_is_refused(tmp_path, new):
    """Trained as it is, only the frozen adapter would be saved; with new ones it would be lost."""
    untied().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "sft", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    with pytest.raises(InputError, match="sepo.model.load_model, which"):
        make_trainer(tmp_path / "out", model=model, peft_config=lora() if new else None)
    make_trainer(tmp_path / "out", model=load_model(str(tmp_path / "sft"))).train()


def test_adapters_that_transformers_added_are_trained(tmp_path):
    model = untied()
    model.add_adapter(lora())
    trainer = make_trainer(tmp_path, model=model, method="simpo", pairs=bare(PAIRS), warmup_steps=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not torch.equal(parameter, before[name]), name
        elif "lora_" not in name:
            assert torch.equal(parameter, before[name]), name


REFERENCES = {
    "itself": lambda m: m,
    "wrapped": lambda m: LiveReference(m),
    "of the same weights": lambda m: sharing(m),
}


def sharing(model):
    twin = tiny_model()
    twin.model.layers[1] = model.model.layers[1]
    return twin


@pytest.mark.parametrize("given", REFERENCES.values(), ids=REFERENCES)
def test_a_reference_that_moves_with_the_policy_is_refused(tmp_path, given):
    model = tiny_model()
    with pytest.raises(InputError, match="reference_model: expected a model of its own, got"):
        start(tmp_path, model, reference_model=given(model))
    assert all(p.requires_grad for p in model.parameters())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["the model", "its base"])
def test_under_lora_too(tmp_path, given):
    model = tiny_model() if given == "the model" else adapted(size=0)
    reference = model if given == "the model" else model.get_base_model()
    new = dict(peft_config=lora()) if given == "the model" else {}
    with pytest.raises(InputError, match="or leave it out under LoRA"):
        start(tmp_path, model, reference_model=reference, **new)


def test_the_policy_without_its_adapters_may_be_named(tmp_path):
    model = adapted(size=0)
    trainer = start(tmp_path, model, reference_model=LiveReference(model, without_adapters=True))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


# Tokens


def with_token(token, *, side="rejected", where=-1):
    pairs = bare(PAIRS)
    one = {name: getattr(pairs[7], name).copy() for name in ("prompt", "chosen", "rejected")}
    one[side][where] = token
    pairs[7] = TokenPair(id="seven", **one)
    return pairs


@pytest.mark.parametrize("token", [V, 5000, -1])
@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("data", ["train", "eval"])
def test_a_token_that_the_policy_lacks(tmp_path, token, side, data):
    pairs = {"pairs": bare(PAIRS), "eval_pairs": bare(PAIRS)}
    pairs["pairs" if data == "train" else "eval_pairs"] = with_token(token, side=side)
    message = f"pair seven: token {token}, but the policy has a vocabulary of {V}; it needs the tok"
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path / "out", method="simpo", **pairs)
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_reference_lacks(tmp_path):
    pairs = with_token(V + 1)
    policy, reference = tiny_model(vocab_size=V + 3), tiny_model()
    with pytest.raises(InputError, match=f"pair seven: token {V + 1}, but the reference has a voc"):
        make_trainer(
            tmp_path / "out", model=policy, method="dpo", pairs=pairs, reference_model=reference
        )


def test_a_token_that_only_the_head_lacks(tmp_path):
    model = untied()
    model.lm_head = torch.nn.Linear(32, V - 4, bias=False)
    with pytest.raises(InputError, match=f"pair seven: token {V - 2}, but the policy has a voc"):
        pairs = [p for p in bare(PAIRS) if max(map(max, (p.prompt, p.chosen, p.rejected))) < V - 4]
        last = {n: getattr(PAIRS[7], n).copy() % 7 for n in ("prompt", "chosen", "rejected")}
        last["chosen"][0] = V - 2
        pairs.append(TokenPair(id="seven", **last))
        make_trainer(tmp_path / "out", model=model, method="simpo", pairs=pairs, eval_pairs=None)


def test_data_of_an_evaluation_is_checked(tmp_path):
    trainer = make_trainer(tmp_path, method="simpo", pairs=bare(PAIRS))
    with pytest.raises(InputError, match="pair seven: token 77, but the policy"):
        trainer.evaluate(with_token(77))


# After training


@pytest.mark.parametrize(
    "more",
    [
        dict(arch="llama"),
        dict(arch="gpt2"),
        dict(arch="mistral", selective_checkpointing=True),
        dict(arch="llama", gradient_checkpointing=True),
        dict(arch="gemma2"),
        dict(arch="llama", method="dpo"),
    ],
    ids=str,
)
def test_after_training_the_model_generates(tmp_path, more):
    trainer = make_trainer(
        tmp_path, **dict(method="simpo", pairs=bare(PAIRS)) | with_reference(more)
    )
    trainer.train(), trainer.evaluate(), trainer.train()
    trainer.save_model()
    # where gemma2's default is sdpa it ignores the cap
    own = dict(attn_implementation=trainer.model.own_attention)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, **own).eval()
    ids = torch.arange(3, 17).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for model in (trainer.model, trainer.model):
        found = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found, saved(input_ids=ids, attention_mask=mask).logits)
        made = [m.generate(ids, attention_mask=mask, max_new_tokens=6) for m in (model, saved)]
        assert torch.equal(*made)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def with_reference(more):
    return more | (dict(reference_model=tiny_model(seed=1)) if more.get("method") == "dpo" else {})


def test_a_callback_generates_between_two_steps(tmp_path):
    """And training goes on as if it had not."""
    from transformers import TrainerCallback

    ids, made = torch.arange(3, 9)[None], []

    class Sample(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            made.append((model.generate(ids, max_new_tokens=3), state.global_step))

    plain, sampled = (make_trainer(tmp_path / n, method="simpo", pairs=bare(PAIRS)) for n in "ab")
    sampled.add_callback(Sample())
    plain.train(), sampled.train()
    assert len(made) == 3
    for name, expected in dict(plain.model.named_parameters()).items():
        assert torch.equal(dict(sampled.model.named_parameters())[name], expected)


def test_after_lora_the_model_generates(tmp_path):
    untied().save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    trainer = start(tmp_path, model, peft_config=lora(), warmup_steps=0)
    trainer.train(), trainer.save_model()
    saved = load_model(str(tmp_path / "out"))
    ids = torch.arange(3, 10)[None]
    assert torch.equal(
        trainer.model.generate(input_ids=ids, max_new_tokens=6),
        saved.generate(input_ids=ids, max_new_tokens=6),
    )
