"""Every layer's states and activations, read where each token is predicted; MaPO's mask of them."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from packed_runs import TRIPLES, with_lora
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from sepo.data import pack, truncate
from sepo.errors import InputError
from sepo.masks import activation_mask, layer_activations, layer_states, num_layers
from sepo.model.forward import hidden_states
from sepo.model.prepare import prepare_model

# peft 0.21 asks transformers 5.23 in words of before
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
LLAMA_LIKE = ("model.layers", "mlp", "self_attn")
PARTS = {  # the layers, and in each its feed-forward and its attention
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE,
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention"),
    "gpt2": ("transformer.h", "mlp", "attn"),
    "opt": ("model.decoder.layers", "fc2", "self_attn"),
}
OPTIONS = {
    "opt": dict(word_embed_proj_dim=32, ffn_dim=48, dropout=0.0),
    "gpt2": dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}
close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def tiny(arch, **options):
    # transformers multiplies experts in 32 bits and fewer
    dtype = torch.float32 if arch == "mixtral" else torch.float64
    return tiny_model(arch, **(dict(dtype=dtype) | OPTIONS.get(arch, {}) | options))


def every_other(response):
    return np.arange(len(response) % 2, len(response), 2).astype(np.int32)


def batch_of_every_other():
    cut = lambda response: truncate(response, every_other(response))
    return pack([(p, cut(c), cut(r)) for p, c, r in TRIPLES])


def prepared(arch, **options):
    return prepare_model(tiny(arch, **options))


def alone():
    """Each sequence by itself: (ids, the indices that predict the selected tokens)."""
    for prompt, *responses in TRIPLES:
        for response in responses:
            ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
            yield ids, torch.from_numpy(every_other(response)) + len(prompt) - 1


@torch.no_grad()
def plain_states(arch):
    model, found = tiny(arch), []
    for ids, where in alone():
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        found.append(torch.cat(output.hidden_states[1:])[:, where])
    return torch.cat(found, 1)


@torch.no_grad()
def plain_activations(arch):
    model = tiny(arch)
    where, *names = PARTS[arch]
    modules = [
        module
        for layer in model.get_submodule(where)
        for module in (*(layer.get_submodule(name) for name in names), layer)
    ]
    first = lambda output: output[0] if isinstance(output, tuple) else output
    seen, found = {}, []
    hooks = [
        m.register_forward_hook(lambda m, _, out: seen.update({m: first(out)})) for m in modules
    ]
    for ids, rows in alone():
        model(input_ids=ids, use_cache=False)
        outputs = [seen[m].reshape(ids.numel(), -1) for m in modules]
        found.append(torch.stack([out[rows].sum(-1) / out.shape[-1] for out in outputs]))
    for hook in hooks:
        hook.remove()
    return torch.cat(found, 1)


def num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("arch", sorted(PARTS))
def test_states_and_activations_are_those_of_separate_passes(arch):
    model, batch = prepared(arch), batch_of_every_other()
    (hidden, states), (again, activations) = (
        layer_states(model, batch),
        layer_activations(model, batch),
    )
    tolerance = dict(rtol=0, atol=1e-5 if arch == "mixtral" else 1e-10)
    torch.testing.assert_close(states, plain_states(arch), **tolerance)
    torch.testing.assert_close(activations, plain_activations(arch), **tolerance)
    with torch.no_grad():
        assert torch.equal(hidden, hidden_states(model, batch)) and torch.equal(hidden, again)
    assert num_layers(model) == len(states) == 2 and len(activations) == 6
    assert num_hooks(model) == 0
    assert not any(t.requires_grad for t in (hidden, states, activations))
    # negative control: one row later is the state that has read the token already
    late = replace(batch, rows=(batch.rows + 1) % len(batch.tokens))
    for read, expected in ((layer_states, states), (layer_activations, activations)):
        assert (read(model, late)[1] - expected).abs().amax(0).median() > 0.01


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "opt"])
def test_under_checkpointing_and_with_adapters(arch):
    """Adapters switched off are no part of the reference; no hook runs twice or not at all."""
    model, batch = tiny(arch), batch_of_every_other()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()  # its name before transformers 5.20
    targets = dict(target_modules=["q_proj", "fc1", "fc2"]) if arch == "opt" else {}
    model = prepare_model(with_lora(model.train(), **targets))
    assert isinstance(model, peft.PeftModel)
    states, activations = plain_states(arch), plain_activations(arch)
    with model.disable_adapter():
        close(layer_states(model, batch)[1], states)
        close(layer_activations(model, batch)[1], activations)
    assert (layer_activations(model, batch)[1] - activations).abs().max() > 0.01


def test_compiled_parts_are_read_and_not_compiled_again():
    model, batch, graphs = prepared("llama"), batch_of_every_other(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for layer in model.model.layers:
        layer.self_attn.compile(backend=backend)
        layer.mlp.compile(backend=backend)
    with torch.no_grad():
        hidden_states(model, batch)  # compiled before any hook
    assert (before := len(graphs)) > 0
    for _ in range(2):
        close(layer_activations(model, batch)[1], plain_activations("llama"))
        close(layer_states(model, batch)[1], plain_states("llama"))
    assert len(graphs) == before


def test_no_pairs():
    model, batch = prepared("llama"), pack([])
    assert layer_states(model, batch)[1].shape == (2, 0, 32)
    activations = layer_activations(model, batch)[1]
    assert activations.shape == (6, 0)
    assert activation_mask(activations, batch.cu_rows).shape == (0,)


def test_hooks_go_when_the_forward_fails(monkeypatch):
    model, batch = prepared("llama"), batch_of_every_other()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.norm, "forward", fail)
    for read in (layer_states, layer_activations):
        with pytest.raises(RuntimeError, match="out of memory"):
            read(model, batch)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_autocast(arch):
    """Layers whose output is in another dtype than the final norm's still stack."""
    model = tiny(arch, dtype=torch.float32)
    model.load_state_dict(tiny(arch).state_dict())
    model, batch = prepare_model(model), batch_of_every_other()
    with torch.autocast("cpu", torch.bfloat16):
        states, activations = (read(model, batch)[1] for read in (layer_states, layer_activations))
    assert activations.dtype == torch.float32
    for found, expected in ((states, plain_states(arch)), (activations, plain_activations(arch))):
        assert 0 < (found - expected).norm() / expected.norm() < 0.03


def test_models_without_such_parts_are_refused():
    bert = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bert", is_decoder=True, vocab_size=61, hidden_size=32,
                             num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    )  # fmt: skip
    with pytest.raises(
        InputError, match="BertModel: expected one attention and one feed-forward.*2"
    ):
        layer_activations(bert, batch_of_every_other())
    model = prepared("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InputError, match="LlamaModel: expected 2 decoder layers .* found 1"):
        num_layers(model)
    model = prepared("llama")
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda hidden, **kwargs: own(layer.mlp(hidden), **kwargs)
    with pytest.raises(InputError, match="LlamaMLP to run once a pass, got 2 times"):
        layer_activations(model, batch_of_every_other())
    layer.mlp.forward = lambda hidden: hidden[:, :3]
    with pytest.raises(InputError, match="expected LlamaMLP to put out a state for each of"):
        layer_activations(model, batch_of_every_other())


def test_minmax_and_zscore():
    lengths = [4, 7, 1, 0, 5]
    generator = torch.Generator().manual_seed(3)
    activations = (
        torch.randn(6, sum(lengths), generator=generator) * 1e-25
    )  # far from 1: squares would underflow
    activations[2, 4:11] = 0.1  # constant over the second response
    cu_rows = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found = {
        norm: activation_mask(activations, cu_rows, norm=norm) for norm in ("minmax", "zscore")
    }
    parts = activations.double().split(lengths, 1)
    minmax = lambda a: (a - a.min()) / (a.max() - a.min())
    zscore = lambda a: (a - a.mean()) / a.var(correction=0).sqrt()
    for norm, formula in (("minmax", minmax), ("zscore", zscore)):
        expected = torch.cat([
            torch.stack([formula(a) if a.min() < a.max() else torch.ones_like(a) for a in part])
            for part in parts if part.shape[1]
        ], 1).mean(0)  # fmt: skip
        torch.testing.assert_close(found[norm].double(), expected, rtol=0, atol=1e-6)
        assert found[norm].dtype == torch.float32
        assert found[norm][11] == 1  # the only token of the third response
    assert 0 <= found["minmax"].min() and found["minmax"].max() <= 1
    zeros = torch.full_like(activations, 0.1)
    for norm in ("minmax", "zscore"):
        assert (activation_mask(zeros, cu_rows, norm=norm) == 1).all()
    with pytest.raises(ValueError, match="norm minmax or zscore, got 'max'"):
        activation_mask(activations, cu_rows, norm="max")
