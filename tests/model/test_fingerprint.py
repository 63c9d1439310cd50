"""A model's name is its weights: not its dtype, device, files or the order they are held in."""

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from sepo.errors import InputError
from sepo.model import fingerprint
from sepo.model.fingerprint import UNREAD, checkpoint_hash, quick_hash, weights_hash


def reload(path, dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def test_dtype_of_the_load_does_not_matter_the_checkpoints_does(tmp_path):
    exact, rounded = tmp_path / "float32", tmp_path / "bfloat16"
    tiny_model().save_pretrained(exact)
    tiny_model().bfloat16().save_pretrained(rounded)
    hashes = {weights_hash(reload(rounded, dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert len(hashes) == 1
    assert weights_hash(reload(exact, torch.float32)) == weights_hash(tiny_model())
    assert weights_hash(reload(exact, torch.float32)) not in hashes


def test_one_value_matters():
    model = tiny_model()
    before = weights_hash(model)
    parameter = next(model.parameters())
    with torch.no_grad():
        value = parameter.view(-1)[-1]
        value.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
    assert weights_hash(model) != before


def test_names_and_shapes_matter():
    one, other = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    other.weight.data = one.weight.data.reshape(2, 3)
    assert weights_hash(one) != weights_hash(other)
    assert weights_hash(nn.ModuleDict({"a": one})) != weights_hash(nn.ModuleDict({"b": one}))


def test_order_of_definition_does_not_matter():
    a, b = nn.Linear(2, 3), nn.Linear(3, 2)
    forth, back = nn.Module(), nn.Module()
    forth.a, forth.b = a, b
    back.b, back.a = b, a
    assert weights_hash(forth) == weights_hash(back)


def test_tied_weights_count_once():
    tied = tiny_model(tie_word_embeddings=True)
    seen = fingerprint._stored(tied)
    assert len({t.data_ptr() for t in seen.values()}) == len(seen)


def test_persistent_buffers_count_and_others_do_not():
    model = nn.Linear(2, 2)
    hashes = [weights_hash(model)]
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert weights_hash(model) == hashes[0]
    for value in (2**24, 2**24 + 1):  # equal in float32
        model.register_buffer("count", torch.tensor(value))
        hashes.append(weights_hash(model))
    assert len(set(hashes)) == 3


def test_chunks_do_not_show(monkeypatch):
    model = tiny_model()
    whole = weights_hash(model)
    monkeypatch.setattr(fingerprint, "CHUNK", 100)
    assert weights_hash(model) == whole


def test_layout_does_not_show():
    model = nn.Linear(4, 6)
    expected = weights_hash(model)
    model.weight.data = model.weight.data.T.contiguous().T
    assert weights_hash(model) == expected


def test_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bias is on the meta device, expected values"):
        weights_hash(model)


def lora(model, **more):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **more))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's call
def test_what_is_not_trained_is_named_as_without_adapters():
    frozen = tiny_model().requires_grad_(False)
    expected = quick_hash(frozen, frozen=True)
    more = dict(modules_to_save=["norm"], r=3)  # the model keeps what it had before, as another
    wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules=["v_proj", "up_proj"], **more))
    for model in (lora(tiny_model()), wrapped):
        assert quick_hash(model, frozen=True) == expected
        names = [n for n, p in model.named_parameters() if not p.requires_grad]
        for name in (names[0], names[-1]):
            weight = model.get_parameter(name)
            with torch.no_grad():
                value = weight.view(-1)[0].clone()
                weight.view(-1)[0] = torch.nextafter(value, torch.tensor(torch.inf))
                assert quick_hash(model, frozen=True) != expected
                weight.view(-1)[0] = value
        with torch.no_grad():  # what is trained does not count
            next(p for p in model.parameters() if p.requires_grad).add_(1)
        assert quick_hash(model, frozen=True) == expected
    assert quick_hash(tiny_model(), frozen=True) is None


def test_weights_as_they_lie_in_memory(monkeypatch):
    one = quick_hash(tiny_model())
    assert one == quick_hash(tiny_model()) != quick_hash(tiny_model(seed=1))
    zeros = nn.Linear(2, 2)
    nn.init.zeros_(zeros.weight), nn.init.zeros_(zeros.bias)
    hashes = {quick_hash(zeros.to(dtype)) for dtype in (torch.bfloat16, torch.float16)}
    assert len(hashes) == 2  # of the same bytes
    turned = tiny_model()
    weight = turned.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    monkeypatch.setattr(fingerprint, "CHUNK", 100)
    assert quick_hash(turned) == one


def test_weights_that_are_elsewhere_are_not_read():
    with torch.device("meta"):
        assert quick_hash(nn.Linear(2, 2)) == UNREAD
    sharded = nn.Linear(2, 2)  # ZeRO-3 leaves nothing
    sharded.weight.data = torch.empty(0)
    assert quick_hash(sharded) == UNREAD


@pytest.fixture
def no_load(monkeypatch):
    """Loading a model is an error: its files must do."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


MODELS = {
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "untied": lambda: tiny_model("llama", tie_word_embeddings=False),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "gpt2": lambda: tiny_model("gpt2"),
    "bfloat16": lambda: tiny_model("qwen2", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_checkpoint_is_named_by_its_files(tmp_path, no_load, make, shard):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "1GB"
    assert checkpoint_hash(str(tmp_path)) == weights_hash(model)


def test_a_checkpoint_is_rounded_as_loading_rounds(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = weights_hash(reload(tmp_path, dtype))
        assert checkpoint_hash(str(tmp_path), dtype=dtype) == expected
    assert checkpoint_hash(str(tmp_path)) != expected


def test_tensors_that_loading_computes_are_loaded(tmp_path):
    model = tiny_model("mixtral", num_local_experts=2, num_experts_per_tok=1)
    model.save_pretrained(tmp_path)  # stores each expert, holds them as one
    assert checkpoint_hash(str(tmp_path)) == weights_hash(reload(tmp_path, torch.float32))


def test_an_older_layout_is_loaded(tmp_path):
    tiny_model().base_model.save_pretrained(tmp_path)  # names without their first part
    assert checkpoint_hash(str(tmp_path)) == weights_hash(reload(tmp_path, torch.float32))


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch, no_load):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tiny_model()
    repository = tmp_path / "models--someone--tiny"
    model.save_pretrained(repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")
    assert checkpoint_hash("someone/tiny") == weights_hash(model)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"can't load a model from .*nowhere: "):
        checkpoint_hash(str(tmp_path / "nowhere"))
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*00002-of*")).unlink()
    with pytest.raises(InputError, match="model-00002-of.* is missing"):
        checkpoint_hash(str(tmp_path))
