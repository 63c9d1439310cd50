"""Packed attention on a GPU: every implementation against the definition, values and gradients."""

import pytest
import torch
from gpu import attention_checks as checks
from gpu.wait_checks import nothing_waits

from sepo.attention import varlen
from sepo.errors import InputError
from sepo.model.prepare import explain_attention, prepare_model

# Dynamo's and Inductor's warnings are about themselves
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

HALF, SINGLE = torch.bfloat16, torch.float32
CAPPED = pytest.mark.skipif(
    varlen.kernel_name(softcap=True) is None, reason="only flash_attn's varlen caps logits"
)
CASES = [
    ("varlen", HALF, (9, 3, 64), "full"),
    ("varlen", HALF, (9, 3, 64), "window"),
    pytest.param("varlen", HALF, (9, 3, 64), "capped", marks=CAPPED),
    ("varlen", torch.float16, (4, 4, 128), "full"),
    ("varlen", HALF, (2, 1, 80), "window"),
    # what is compiled for flex takes its time: one case a kernel
    ("flex", HALF, (9, 3, 64), "full"),
    ("flex", HALF, (9, 3, 64), "window"),
    ("flex", HALF, (9, 3, 64), "capped"),
    ("flex", SINGLE, (4, 2, 32), "full"),
    ("sdpa", HALF, (9, 3, 64), "full"),
    ("sdpa", HALF, (9, 3, 64), "window"),
    ("sdpa", HALF, (9, 3, 64), "capped"),
    ("sdpa", SINGLE, (4, 2, 32), "full"),
    ("sdpa", SINGLE, (4, 2, 32), "window"),
]


@pytest.fixture
def as_in_training():
    """Without the tests' deterministic mode, which takes other kernels and fills memory with NaN."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("impl", "dtype", "heads", "options"), CASES)
def test_values_and_gradients(impl, dtype, heads, options, as_in_training):
    checks.attention(impl, "cuda", dtype, heads, checks.OPTIONS[options])


@pytest.mark.parametrize(
    ("impl", "dtype", "arch"),
    [
        ("varlen", HALF, "llama"),
        ("varlen", HALF, "mistral"),
        ("varlen", HALF, "gpt2"),
        ("flex", HALF, "llama"),
        ("flex", HALF, "gemma2"),
        ("sdpa", HALF, "gemma2"),
        ("sdpa", SINGLE, "llama"),
        ("sdpa", SINGLE, "mistral"),
    ],
)
def test_models_packed_equal_separate(impl, dtype, arch, as_in_training):
    overrides = {}
    if arch == "gpt2":
        overrides = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, n_embd=192, n_head=3)
    checks.model(impl, "cuda", dtype, arch, **overrides)


@pytest.mark.parametrize(("impl", "dtype"), [("varlen", HALF), ("flex", HALF), ("sdpa", HALF)])
def test_nothing_waits_in_forward_and_backward(impl, dtype, as_in_training):
    nothing_waits(impl, checks.step(impl, "cuda", dtype))


def test_nothing_waits_under_autocast(as_in_training):
    """Float32 weights, as a trainer keeps them: the choice is by what autocast makes of them."""
    nothing_waits("auto", checks.step("auto", "cuda", SINGLE, autocast=True))
    nothing_waits("varlen", checks.step("varlen", "cuda", SINGLE, autocast=True))


@pytest.mark.parametrize("impl", ["varlen", "sdpa"])
def test_repeatable_bit_for_bit(impl):
    checks.repeatable(impl, "cuda", HALF)


@pytest.mark.parametrize("impl", ["varlen", "flex"])
def test_memory_of_many_rows(impl, as_in_training):
    checks.memory(impl, "cuda", HALF, prompt=700, response=650, pairs=24, heads=(9, 3, 64))


def test_what_auto_takes():
    model = prepare_model(checks.tiny_model("llama", dtype=HALF, **checks.SHAPE).to("cuda"))
    assert explain_attention(model).startswith("varlen")
    assert explain_attention(model, dtype=SINGLE).startswith("sdpa")
    model = prepare_model(checks.tiny_model("llama", **checks.SHAPE).to("cuda"), attn_impl="varlen")
    with torch.autocast("cuda", HALF):
        model(batch=checks.batch_of([(3, 4, 5)]).to("cuda"))
    with pytest.raises(InputError, match="needs float16 or bfloat16, got torch.float32"):
        model(batch=checks.batch_of([(3, 4, 5)]).to("cuda"))
    with pytest.raises(InputError, match="needs heads of one width, a multiple of 8"):
        prepare_model(checks.tiny_model("llama", head_dim=20).to("cuda"), attn_impl="varlen")
