"""Folders of tiny models and of adapters on them, and damage done to them."""

import json

import peft
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

NOTHING = ("missing_keys", "unexpected_keys", "mismatched_keys")
IDS = torch.arange(3, 12)[None]
UP = "model.layers.1.mlp.up_proj.weight"


def untied(**more):
    return tiny_model("llama", tie_word_embeddings=False, **more)


def save_adapter(path, base, *, model=None, seed=1, **options):
    """An adapter with weights of its own on the model at `base`; returns that PeftModel."""
    model = untied() if model is None else model
    options = dict(target_modules=["q_proj", "down_proj"]) | options
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(path)
    return adapted


def rewrite(path, change, name="model.safetensors"):
    tensors = load_file(path / name)
    save_file(change(tensors), path / name, metadata={"format": "pt"})


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}
