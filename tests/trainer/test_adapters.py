"""LoRA: adapters train and nothing else, and the model without them is the reference."""

import json

import pytest
import torch
from tiny import tiny_model
from tiny_trainer import PAIRS, bare, make_trainer, weights
from training_run import make_run

from sepo import SePOConfig
from sepo.data import pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.errors import InputError
from sepo.model.forward import head, hidden_states
from sepo.ops import explain_selected_logprob
from sepo.trainer import adapters

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def lora(**more):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **more)


def make(tmp_path, *, model=None, **args):
    model = tiny_model() if model is None else model
    return make_trainer(tmp_path, model=model, peft_config=lora(), **args)


def test_adapters_train_and_nothing_else(tmp_path):
    trainer, before = make(tmp_path, warmup_steps=0), dict(tiny_model().named_parameters())
    at_first = weights(trainer)
    trainer.train()
    for name, found in weights(trainer).items():
        assert torch.equal(found, at_first[name]) == ("lora_" not in name), name
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(found, before[plain])
    assert not any("lm_head" in name and "lora_" in name for name in at_first)
    first, full = trainer.state.log_history[0], make_trainer(tmp_path, warmup_steps=0)
    full.train()  # new adapters add nothing: both start at the same loss
    assert first["loss"] == pytest.approx(full.state.log_history[0]["loss"], abs=1e-6)


def test_the_seed_decides_the_adapters(tmp_path):
    first, second, other = (make(tmp_path, seed=seed) for seed in (3, 3, 4))
    names = [name for name in weights(first) if "lora_A" in name]
    for name in names:
        assert torch.equal(weights(first)[name], weights(second)[name])
    assert not any(torch.equal(weights(first)[n], weights(other)[n]) for n in names)


def test_the_reference_is_the_model_without_adapters(tmp_path):
    args = dict(method="dpo", pairs=bare(PAIRS), eval_pairs=bare(PAIRS), warmup_steps=0)
    alone = make(tmp_path, **args)
    beside = make(tmp_path, reference_model=tiny_model(), **args)
    assert alone.reference.without_adapters
    alone.train(), beside.train()
    for name, expected in weights(beside).items():
        assert torch.equal(weights(alone)[name], expected), name
    metrics, expected = alone.evaluate(), beside.evaluate()
    assert metrics["eval_rewards/margins"] == expected["eval_rewards/margins"] != 0


def test_a_frozen_head_takes_two_products(tmp_path):
    model = make(tmp_path).model.train()
    batch = pack([make_segments(pair, Selection("all")) for pair in PAIRS])
    hidden, (weight, *_) = hidden_states(model, batch), head(model)
    done = explain_selected_logprob(hidden, weight, batch.rows, batch.targets)
    assert (done.schedule, done.gemms) == ("frozen_head", 2)


def test_a_checkpoint_holds_the_adapter_and_is_continued_from(tmp_path):
    args = dict(save_strategy="steps", save_steps=1)
    whole = make(tmp_path / "whole", **args)
    whole.train(), whole.save_model()
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-1"):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "model.safetensors").exists()
    resumed = make(tmp_path / "resumed", **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed.state.global_step == whole.state.global_step == 3
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "whole")
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name
        assert torch.equal(dict(loaded.named_parameters())[name], expected), name


def test_adapters_of_bfloat16_weights_are_float32(tmp_path):
    """Steps of 1e-6 would be lost in bfloat16, which is what the frozen weights are."""
    trainer = make(tmp_path, model=tiny_model(dtype=torch.bfloat16), learning_rate=1e-6)
    before = weights(trainer)
    trainer.train()
    for name, found in weights(trainer).items():
        assert found.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    moved = [n for n in before if "lora_B" in n and not torch.equal(before[n], weights(trainer)[n])]
    assert len(moved) == len([n for n in before if "lora_B" in n])


def test_the_users_own_adapters_are_kept(tmp_path):
    """A PeftModel is trained as it is; its dropout is its own, the model's is off."""
    model = peft.get_peft_model(
        tiny_model("gpt2", resid_pdrop=0.5), lora(lora_dropout=0.25, fan_in_fan_out=True)
    )
    trainer = make_trainer(tmp_path, model=model, method="dpo", pairs=bare(PAIRS))
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for n, p in rates.items() if "lora_dropout" in n} == {0.25}
    assert {p for n, p in rates.items() if "lora_dropout" not in n} == {0.0}
    trainer.train()


def test_flags_become_a_lora_config():
    config = SePOConfig(
        output_dir="-", use_cpu=True, use_peft=True, lora_r=3, lora_alpha=5, lora_dropout=0.125,
        lora_target_modules=["q_proj"], lora_modules_to_save=["norm"],
    )  # fmt: skip
    made = adapters.lora_config(config)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (3, 5, 0.125)
    assert made.target_modules == {"q_proj"} and made.modules_to_save == ["norm"]
    config.lora_target_modules = ["all-linear"]
    assert adapters.lora_config(config).target_modules == "all-linear"


@pytest.mark.parametrize(
    ("more", "arch", "message"),
    [
        (dict(modules_to_save=["lm_head"]), "qwen2", "an adapter on the head is not supported"),
        (dict(modules_to_save=["embed_tokens"]), "llama", "adapter on the head is not supported"),
    ],
    ids=["head", "tied-embedding"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_an_adapter_on_the_head_is_refused(tmp_path, more, arch, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path / "out", arch=arch, peft_config=lora(**more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (dict(), "peft"),
        (dict(load_in_4bit=True), "bitsandbytes"),
        (dict(load_in_8bit=True), "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, flags, package):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == package else name)
    monkeypatch.setattr("sepo.trainer.checks._has_gpu", lambda args: True)
    config = SePOConfig(output_dir="-", use_cpu=True, use_peft=True, **flags)
    with pytest.raises(InputError, match=f"needs {package}, which is not installed"):
        adapters.lora_config(config), adapters.quantization_config(config)


def test_from_the_command_line(tmp_path):
    """DPO on raw rows, no reference named: one model is loaded, and an adapter written."""
    from sepo.train import main

    rows = [dict(prompt=f"w3 w{i}", chosen=" w5 w6", rejected=" w7") for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = make_run(tmp_path, method="dpo", dataset_name=str(tmp_path / "pairs.jsonl"))
    main([*argv, "--output_dir", str(tmp_path / "out"), "--use_peft", "--lora_r", "2"])
    written = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {"adapter_model.safetensors"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_quantised_weights_are_not_trained_on_a_cpu():
    with pytest.raises(InputError, match="--load_in_4bit: bitsandbytes trains on a GPU, got a CPU"):
        SePOConfig(output_dir="-", use_cpu=True, use_peft=True, load_in_4bit=True)


def test_flags_become_a_quantisation(monkeypatch):
    """As on a machine with a GPU and bitsandbytes: computed in the precision of the run."""
    monkeypatch.setattr("sepo.trainer.checks._has_gpu", lambda args: True)
    monkeypatch.setattr(adapters, "find_spec", lambda name: name)
    monkeypatch.setattr("transformers.BitsAndBytesConfig.post_init", lambda self: None)
    base = dict(output_dir="-", use_cpu=True, use_peft=True)
    made = adapters.quantization_config(SePOConfig(**base, load_in_4bit=True, bf16=True))
    assert made.load_in_4bit and made.bnb_4bit_quant_type == "nf4"
    assert made.bnb_4bit_compute_dtype == torch.bfloat16
    assert adapters.quantization_config(SePOConfig(**base, load_in_8bit=True)).load_in_8bit
    assert adapters.quantization_config(SePOConfig(**base)) is None
