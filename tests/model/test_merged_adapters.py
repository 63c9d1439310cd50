"""An adapter is merged into its base or refused in a line, and a run goes on from it."""

import json
import math

import peft
import pytest
import torch
from model_folders import IDS, NOTHING, UP, edit_json, rewrite, save_adapter, untied
from packed_runs import packed
from tiny import random_scored_pairs, tiny_model, tiny_tokenizer
from training_run import make_run
from transformers import AutoModelForCausalLM

from sepo.errors import InputError
from sepo.model.fingerprint import checkpoint_hash, quick_hash, weights_hash
from sepo.model.folder import values_of
from sepo.model.load import load_model, load_tokenizer
from sepo.model.prepare import prepare_model
from sepo.score.score import score_dataset

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


KINDS = {
    "lora": dict(r=4, lora_alpha=24),
    "dora": dict(r=4, use_dora=True),
    "rslora with a pattern": dict(r=4, use_rslora=True, alpha_pattern={"down_proj": 3}),
    "all linear": dict(target_modules="all-linear"),
    "and whole modules": dict(modules_to_save=["lm_head", "norm"]),
    "embedding": dict(target_modules=["embed_tokens", "lm_head", "v_proj"]),
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_adapter_is_merged(base, tmp_path, options):
    expected = save_adapter(tmp_path / "sft", base, **options)(IDS).logits
    model = load_model(str(tmp_path / "sft"))
    assert not hasattr(model, "peft_config") and type(model) is type(untied())
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)
    assert (untied()(IDS).logits - expected).abs().max() > 0.1
    assert model.name_or_path == str(tmp_path / "sft")
    model.save_pretrained(tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)


def test_nothing_is_merged_into_shards(base, tmp_path, monkeypatch):
    save_adapter(tmp_path / "sft", base)
    load = AutoModelForCausalLM.from_pretrained
    sharded = lambda *a, **k: (load(*a, **k)[0].to("meta"), dict.fromkeys(NOTHING, []))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", sharded)
    with pytest.raises(InputError, match="the model is sharded as it is loaded .*merge it first"):
        load_model(str(tmp_path / "sft"))


def test_an_adapter_on_an_adapter(base, tmp_path):
    first = save_adapter(tmp_path / "sft", base).merge_and_unload()
    second = save_adapter(tmp_path / "dpo", tmp_path / "sft", model=first, seed=2, r=2)
    found = load_model(str(tmp_path / "dpo"))(input_ids=IDS).logits
    torch.testing.assert_close(found, second(IDS).logits, rtol=0, atol=1e-4)
    assert (
        load_tokenizer(str(tmp_path / "dpo")).get_vocab() == load_tokenizer(str(base)).get_vocab()
    )


def test_an_adapter_has_a_name_of_its_own(base, tmp_path):
    hashes = [checkpoint_hash(str(base))]
    for name, options in (("a", {}), ("b", dict(lora_alpha=9)), ("c", dict(seed=3))):
        save_adapter(tmp_path / name, base, **options)
        hashes.append(checkpoint_hash(str(tmp_path / name)))
        assert weights_hash(load_model(str(tmp_path / name))) == hashes[-1]
    untied(seed=5).save_pretrained(base)
    hashes.append(checkpoint_hash(str(tmp_path / "a")))
    assert len(set(hashes)) == 5


def rounded_otherwise(model):
    """As another machine's products would: read_model's marks stay as they would be there."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.tensor(math.inf)))
    model.merged_values = values_of(model.state_dict())
    return model


def test_a_merged_base_goes_by_its_folder(base, tmp_path):
    """Not by the last bits of a merge: a run of LoRA on it goes on on any machine."""
    save_adapter(tmp_path / "sft", base)
    merged = lambda **how: load_model(str(tmp_path / "sft"), **how)
    new = lambda: peft.LoraConfig(target_modules=["v_proj"], modules_to_save=["norm"], r=2)
    for hashed in (
        quick_hash,
        lambda model: quick_hash(peft.get_peft_model(model, new()), frozen=True),
        lambda model: quick_hash(model.requires_grad_(False), frozen=True),
    ):
        expected = hashed(merged())
        assert hashed(rounded_otherwise(merged())) == expected
        assert hashed(merged(dtype=torch.bfloat16)) != expected
        save_adapter(tmp_path / "other", base, seed=7)
        assert hashed(load_model(str(tmp_path / "other"))) != expected
        changed = merged()
        with torch.no_grad():
            changed.get_parameter(UP).view(-1)[0] += 1e-3
        assert hashed(changed) != expected


def test_what_was_trained_upon_a_merged_base_is_not_its_folder(base, tmp_path):
    """peft hands back the very model that was merged before."""
    save_adapter(tmp_path / "sft", base)
    merged = load_model(str(tmp_path / "sft"))
    before = weights_hash(merged), quick_hash(merged)
    adapted = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["v_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trained = adapted.merge_and_unload()
    assert trained is merged
    assert weights_hash(trained) != before[0] and quick_hash(trained) != before[1]
    trained.save_pretrained(tmp_path / "dpo")
    assert weights_hash(trained) == checkpoint_hash(str(tmp_path / "dpo"))


def test_the_precision_check_reads_the_adapter_again(base, tmp_path, capsys):
    """Not the base, whose name a model made of it would have."""
    save_adapter(tmp_path / "sft", base)
    models = [
        load_model(str(path), dtype=torch.bfloat16) for path in (tmp_path / "sft", base)
    ]  # fmt: skip
    tokens = dict(tokenizer=tiny_tokenizer(), precision_check=2, progress=False)
    score_dataset(
        random_scored_pairs(3), tmp_path / "out", oracle=models[0], reference=models[1], **tokens
    )
    note = json.loads(next((tmp_path / "out").glob("*manifest*.json")).read_text())
    assert note["oracle_name"] == str(tmp_path / "sft")


ADAPTERS = {
    "cut off": (
        lambda p: (p / "adapter_model.safetensors").write_bytes(b"abc"),
        "adapter_model.safetensors is not a whole safetensors file",
    ),
    "missing": (
        lambda p: rewrite(p, lambda t: dict(list(t.items())[1:]), name="adapter_model.safetensors"),
        r"expected every tensor of PeftModel and no other, got 1 missing \(base_model.*lora_A",
    ),
    "unexpected": (
        lambda p: rewrite(
            p,
            lambda t: t | {"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(1)},
            name="adapter_model.safetensors",
        ),
        r"got 1 unexpected",
    ),
    "misshapen": (
        lambda p: rewrite(
            p, lambda t: {k: v[:1].clone() for k, v in t.items()}, name="adapter_model.safetensors"
        ),
        "can't be merged into .*size mismatch",
    ),
    "pickled": (
        lambda p: (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"),
        r"expected adapter_model.safetensors \(others are not read: they unpickle\), found none",
    ),
    "no base": (
        lambda p: edit_json(p / "adapter_config.json", base_model_name_or_path=None),
        "expected base_model_name_or_path in its adapter_config.json, got None",
    ),
    "base not there": (
        lambda p: edit_json(p / "adapter_config.json", base_model_name_or_path="/no/where"),
        "is an adapter on /no/where: can't load a model from /no/where",
    ),
    "its own base": (
        lambda p: edit_json(p / "adapter_config.json", base_model_name_or_path=str(p)),
        "is its own base",
    ),
    "a prompt": (
        lambda p: edit_json(p / "adapter_config.json", peft_type="PROMPT_TUNING"),
        "PROMPT_TUNING adapters put tokens or keys before every sequence",
    ),
    "unknown": (
        lambda p: edit_json(p / "adapter_config.json", peft_type="NO_SUCH"),
        "can't be merged into",
    ),
    "torn": (
        lambda p: (p / "adapter_config.json").write_text("{"),
        "expected peft's adapter_config.json, got",
    ),
    "a model too": (
        lambda p: untied().save_pretrained(p),
        "expected a model or an adapter, found both",
    ),
}


@pytest.mark.parametrize(("tear", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_cannot_be_merged_is_refused(base, tmp_path, tear, message):
    save_adapter(tmp_path / "sft", base)
    tear(tmp_path / "sft")
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "sft"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_an_embedding_that_is_the_head_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    options = dict(model=tiny_model("llama"), target_modules=["embed_tokens", "q_proj"])
    save_adapter(tmp_path / "sft", tmp_path / "base", **options)
    with pytest.raises(InputError, match="it changes an embedding that is the head too"):
        load_model(str(tmp_path / "sft"))


# From SFT with LoRA to DPO


def run_dpo(tmp_path, policy, name, *flags):
    from sepo.train import main

    argv = ["--config", str(tmp_path / "run.yaml"), "--model_name_or_path", str(policy)]
    main([*argv, "--method", "dpo", "--output_dir", str(tmp_path / name), *map(str, flags)])
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0])


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--use_peft",),
        ("--use_peft", "--lora_target_modules", "down_proj"),
        ("--use_peft", "--reference", "SFT"),
    ],
    ids=["whole", "lora", "other modules", "reference named"],
)
def test_dpo_starts_where_the_adapter_ended(tmp_path, capsys, flags):
    rows = [dict(prompt=f"w3 w{i}", chosen=" w5 w6", rejected=" w7") for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_run(
        tmp_path, dataset_name=str(tmp_path / "pairs.jsonl"), learning_rate=0.1, warmup_steps=0
    )
    sft = tmp_path / "sft"
    save_adapter(sft, tmp_path / "model", model=tiny_model())
    first = run_dpo(tmp_path, sft, "dpo", *(str(sft) if f == "SFT" else f for f in flags))
    assert f"policy: {sft}, a LORA adapter merged into" in capsys.readouterr().out
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    logp = prepare_model(load_model(str(sft)))
    expected = -sum(chosen_nll(logp, row) for row in rows) / len(rows)
    assert first["logps/chosen"] == pytest.approx(expected, abs=1e-4)
    last = load_model(str(tmp_path / "dpo"))  # on top of the adapter, if it is one too
    assert (last(input_ids=IDS).logits - logp(input_ids=IDS).logits).abs().max() > 1e-4


def chosen_nll(model, row):
    tokenizer = tiny_tokenizer()
    prompt, response = (tokenizer(row[key])["input_ids"] for key in ("prompt", "chosen"))
    ids = torch.tensor([*prompt, *response, tokenizer.eos_token_id])[None]
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    targets = ids[0, len(prompt) :]
    return -logp[len(prompt) - 1 : -1].gather(-1, targets[:, None]).sum().item()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "its weights are quantised by gptq and can't be trained; expected --use_peft"),
        (("--use_peft", "--load_in_4bit"), "is quantised already, by gptq"),
    ],
)
def test_quantised_weights_are_not_trained(tmp_path, flags, message, monkeypatch):
    monkeypatch.setattr("sepo.trainer.checks._has_gpu", lambda args: True)
    monkeypatch.setattr("sepo.train.quantization_config", lambda args: None)
    make_run(tmp_path)
    edit_json(
        tmp_path / "model/config.json", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(InputError, match=message):
        run_dpo(tmp_path, tmp_path / "model", "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_packed_batch_of_a_merged_model_is_the_adapters(base, tmp_path):
    adapted = save_adapter(tmp_path / "sft", base)
    expected = prepare_model(adapted)(batch=packed())
    found = load_model(str(tmp_path / "sft"))(batch=packed())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
