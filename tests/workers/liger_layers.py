"""Liger's layer kernels, run on the CPU by Triton's interpreter: a leg of test_fused_layers.py.

`TRITON_INTERPRET=1 pytest tests/workers/liger_layers.py`
"""

import sys

import numpy as np
import pytest
import torch
import triton.language as tl
from gpu.step_checks import layer_step, layers_agree
from liger_kernel.ops.geglu import geglu_forward
from liger_kernel.ops.rms_norm import rms_norm_forward
from tiny import tiny_model
from tiny_trainer import PAIRS, bare, make_trainer, weights
from triton.runtime import interpreter as interpreter_of_triton

from sepo.errors import InputError
from sepo.model.prepare import prepare_model, probe_logprob
from sepo.trainer.fused import fuse_layers
from sepo.trainer.layers import fused_names, why_not_liger
from sepo_kernels.devices import INTERPRET

CPU = torch.device("cpu")
ARCHS = {  # what Liger's kernels take the place of
    "llama": ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm"],
    "mistral": ["MistralAttention", "MistralMLP", "MistralRMSNorm"],
    "qwen2": ["Qwen2Attention", "Qwen2MLP", "Qwen2RMSNorm"],
    "qwen3": ["Qwen3Attention", "Qwen3MLP", "Qwen3RMSNorm"],
    "gemma2": ["Gemma2Attention", "Gemma2MLP", "Gemma2RMSNorm"],
}
assert INTERPRET, "Triton decides at its import"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """What it lacks for Liger's kernels: numbers that are tensors, and a GPU library's root."""
    convert = interpreter_of_triton._implicit_cvt

    def with_floats(arg):
        if not isinstance(arg, float):
            return convert(arg)
        handle = interpreter_of_triton.TensorHandle(np.array([arg], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter_of_triton, "_implicit_cvt", with_floats)
    # names of the library's own file, looked up in the kernel's time
    for name, file, function in (
        ("rsqrt", rms_norm_forward, lambda x: tl.math.rsqrt(x)),
        ("tanh", geglu_forward, lambda x: 1 - 2 / (tl.exp(2 * x) + 1)),
    ):
        monkeypatch.setattr(sys.modules[file.__module__], name, function)


def fused(arch: str, **how):
    model = prepare_model(tiny_model(arch))
    fuse_layers(model, **how)
    return prepare_model(model).train()


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "autocast"])
@pytest.mark.parametrize("arch", ARCHS)
def test_as_accurate_as_the_plain_layers(arch, dtype):
    """Not in bfloat16, of which the interpreter multiplies the bits."""

    def fuse(model):
        fuse_layers(model)
        assert fused_names(model) == ARCHS[arch]

    layers_agree(arch, fuse, "cpu", dtype)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_other_model_changes(arch):
    other = prepare_model(tiny_model(arch, seed=1)).train()
    expected, names = layer_step(other), other.state_dict().keys()
    file = sys.modules[type(other).__module__]
    classes = [c for c in vars(file).values() if isinstance(c, type)]
    before = dict(vars(file)), [dict(vars(c)) for c in classes]
    assert fused(arch).state_dict().keys() == names
    assert (dict(vars(file)), [dict(vars(c)) for c in classes]) == before
    for model in (other, prepare_model(tiny_model(arch, seed=1)).train()):
        assert not fused_names(model)
        assert all(torch.equal(x, expected[name]) for name, x in layer_step(model).items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "how", [dict(selective_checkpointing=True), dict(gradient_checkpointing=True)], ids=str
)
def test_recomputed_as_it_was(tmp_path, how, lora):
    """Liger rotates in place: what is kept for backward must not be rotated twice."""

    def gradients(**more):
        adapters = None
        if lora:
            peft = pytest.importorskip("peft")
            torch.manual_seed(0)
            adapters = peft.LoraConfig(
                target_modules=["q_proj", "k_proj", "gate_proj"], init_lora_weights=False
            )
        trainer = make_trainer(tmp_path, fused_layers="liger", peft_config=adapters, **more)
        trainer.accelerator.prepare_model(trainer.model)
        loss = trainer.training_step(trainer.model, {})
        found = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
        return {"loss": loss} | found

    expected, found = gradients(), gradients(**how)
    assert len(expected) > 4
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "asked", [dict(fused_layers="liger"), dict(use_liger_kernel=True)], ids=str
)
def test_a_run_with_a_live_reference(tmp_path, asked):
    """The reference computes as the policy does: no reward before the first update."""
    args = dict(method="dpo", pairs=bare(PAIRS), eval_pairs=None)
    trainer = make_trainer(tmp_path, reference_model=tiny_model(), **args, **asked)
    assert trainer.args.fused_layers == "liger" and not trainer.args.use_liger_kernel
    trainer.train()
    first, *_, last = [line for line in trainer.state.log_history if "loss" in line]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert last["rewards/margins"] != 0


def test_a_run_ends_where_the_plain_one_does(tmp_path):
    plain, ours = make_trainer(tmp_path), make_trainer(tmp_path, fused_layers="liger")
    assert fused_names(ours.model) == ARCHS["llama"] and not fused_names(plain.model)
    plain.train(), ours.train()
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], expected, rtol=0, atol=1e-5)


def test_kernels_by_name():
    kernels = dict(rope=False, swiglu=False, fused_linear_cross_entropy=False)
    assert fused_names(fused("llama", kernels=kernels)) == ["LlamaRMSNorm"]
    expected = "expected rms_norm | rope | swiglu, Liger's kernels for llama"
    with pytest.raises(InputError, match=f"^--liger_kernel_config geglu: {expected}"):
        fused("llama", kernels=dict(geglu=True))


def test_kernels_that_compute_something_else_are_refused():
    model = prepare_model(tiny_model())
    for layer in model.model.layers:  # and the configuration says silu
        layer.mlp.act_fn = torch.nn.GELU()
    expected = probe_logprob(model)
    with pytest.raises(InputError, match="^--fused_layers: expected Liger's kernels to give Llama"):
        fuse_layers(model)
    assert not fused_names(model) and torch.equal(probe_logprob(model), expected)


def test_what_liger_does_not_know():
    reason = lambda arch, **more: why_not_liger(tiny_model(arch, **more), CPU)
    assert reason("llama") is None
    assert reason("gpt_neox") == "it has no kernels for the architecture gpt_neox"
    assert reason("llama", hidden_act="gelu") == "it computes silu, got a model with gelu"
    assert "32 or 16 bits, got torch.float64" in reason("llama", dtype=torch.float64)
