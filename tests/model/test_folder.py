"""A model's folder is read whole, or refused in a line."""

import pytest
import torch
from model_folders import UP, edit_json, rewrite, save_adapter, untied, without
from tiny import tiny_tokenizer

from sepo.errors import InputError
from sepo.model.fingerprint import checkpoint_hash
from sepo.model.folder import find_folder
from sepo.model.load import load_model

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


TORN = {
    "missing": (
        lambda p: rewrite(p, without(UP)),
        rf"expected every tensor of LlamaForCausalLM and no other, got 1 missing \({UP}\)",
    ),
    "head missing": (
        lambda p: rewrite(p, without("lm_head.weight")),
        r"got 1 missing \(lm_head.weight\)",
    ),
    "unexpected": (
        lambda p: rewrite(p, lambda t: t | {"value_head.weight": torch.zeros(2)}),
        r"got 1 unexpected \(value_head.weight\)",
    ),
    "misshapen": (
        lambda p: rewrite(p, lambda t: t | {UP: torch.zeros(4, 32)}),
        rf"got 1 misshapen \({UP} \(4, 32\) for \(48, 32\)\)",
    ),
    "a layer fewer": (
        lambda p: edit_json(p / "config.json", num_hidden_layers=1),
        r"got 9 unexpected \(model.layers.1.input_layernorm.weight, .*, \.\.\.\)",
    ),
    "a layer more": (
        lambda p: edit_json(p / "config.json", num_hidden_layers=3),
        r"got 9 missing \(model.layers.2.input_layernorm.weight, .*, \.\.\.\)",
    ),
    "another vocabulary": (
        lambda p: edit_json(p / "config.json", vocab_size=50),
        r"got 2 misshapen \(lm_head.weight \(61, 32\) for \(50, 32\), ",
    ),
    "compiled": (
        lambda p: rewrite(p, lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}),
        "the model's own names, got _orig_mod..*; save the model inside torch.compile",
    ),
    "compiled layers": (
        lambda p: rewrite(p, lambda t: {k.replace(".1.", ".1._orig_mod."): t[k] for k in t}),
        "the model's own names, got model.layers.1._orig_mod.",
    ),
    "cut off": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:-100]
        ),
        "model.safetensors is not a whole safetensors file",
    ),
    "empty": (
        lambda p: (p / "model.safetensors").write_bytes(b""),
        "model.safetensors is not a whole safetensors file",
    ),
    "no weights": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        r"expected model.safetensors or .* \(other files are not read: they unpickle\), found none",
    ),
    "torn index": (
        lambda p: (p / "model.safetensors").rename(p / "a.safetensors")
        and (p / "model.safetensors.index.json").write_text('{"weight_map": '),
        "expected a weight_map in model.safetensors.index.json",
    ),
    "shard missing": (
        lambda p: (p / "model.safetensors").rename(p / "a.safetensors")
        and (p / "model.safetensors.index.json").write_text('{"weight_map": {"x": "b.safetensors"}}'),
        "b.safetensors is missing",
    ),
    "torn config": (
        lambda p: (p / "config.json").write_text('{"model_type": '),
        "can't load a model from",
    ),
    "config of no sense": (
        lambda p: edit_json(p / "config.json", num_hidden_layers="two"),
        "can't load a model from",
    ),
    "unknown type": (
        lambda p: edit_json(p / "config.json", model_type="no_such_model"),
        "can't load a model from",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tear", "message"), TORN.values(), ids=TORN)
def test_a_model_that_is_not_whole_is_refused(base, tear, message, capfd):
    tear(base)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(base))
    assert str(base) in str(caught.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("role", ["reference", "oracle"])
@pytest.mark.parametrize("fault", ["missing", "compiled", "a layer fewer", "cut off"])
def test_nothing_is_scored_by_a_model_that_is_not_whole(base, tmp_path, role, fault):
    from sepo.commands.main import run

    other = tmp_path / "other"
    untied(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}\n'
    )
    tear, message = TORN[fault]
    tear(base)
    models = {"reference": other, "oracle": other, role: base}
    argv = ["--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    argv += [part for role, path in models.items() for part in (f"--{role}", path)]
    with pytest.raises(InputError, match=message):
        run(["score", *map(str, argv)])
    assert not (tmp_path / "out").exists()


def test_a_fingerprint_is_of_a_whole_model(base):
    rewrite(base, without(UP))
    with pytest.raises(InputError, match=r"got 1 missing"):
        checkpoint_hash(str(base))
    untied().save_pretrained(base)
    edit_json(base / "config.json", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"got 9 unexpected"):
        checkpoint_hash(str(base))


def test_what_a_folder_holds_is_one_line(base, tmp_path):
    save_adapter(tmp_path / "sft", base)
    assert str(find_folder(base)) == f"{base} (llama)"
    expected = f"{tmp_path / 'sft'}, a LORA adapter merged into {base} (llama)"
    assert str(find_folder(tmp_path / "sft")) == expected
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert find_folder(base).quantised == "gptq"
    with pytest.raises(InputError, match="base, which is quantised by gptq: it can't be merged"):
        find_folder(tmp_path / "sft")
