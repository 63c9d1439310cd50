"""--fused_layers: what auto comes to, what it is worth in kernels, and that nothing else changes."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from launches import launch_nothing
from tiny import random_scored_pairs, tiny_model
from tiny_trainer import make_trainer
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sepo import SePOConfig
from sepo.data import pack
from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.trainer import fused, identity, layers
from sepo.trainer.layers import choose_fused, fused_names, use_liger, why_not_liger

ROOT = Path(__file__).parents[2]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


# What auto comes to


@pytest.fixture
def installed(monkeypatch):
    """As with or without Liger, and a compiler for a GPU."""

    def are(liger: bool, triton: bool = True):
        known = SimpleNamespace(
            MODEL_TYPE_TO_APPLY_LIGER_FN=dict(llama=lambda rope, swiglu, model: None)
        )
        monkeypatch.setattr(layers, "find_spec", lambda name: known if liger else None)
        monkeypatch.setattr(layers, "_liger", lambda: known)
        monkeypatch.setattr(layers, "has_triton", lambda: triton)

    return are


@pytest.mark.parametrize(
    ("arch", "liger", "triton", "how", "expected"),
    [
        ("llama", True, True, {}, ("liger", "auto")),
        ("llama", False, True, {}, ("compile", "liger-kernel is not installed")),
        ("gpt2", True, True, {}, ("compile", "it has no kernels for the architecture gpt2")),
        (
            "gpt2", True, False, {},
            ("none", "it has no kernels for the architecture gpt2, and the compiler has no triton here"),
        ),
        ("llama", True, True, dict(compiled=True), ("compile", "--torch_compile")),
        ("llama", True, True, dict(selective=True), ("liger", "auto")),
        (
            "llama", False, True, dict(selective=True),
            ("none", "liger-kernel is not installed, and a compiled part hides its GEMMs from --selective_checkpointing"),
        ),
    ],
)  # fmt: skip
def test_auto_on_a_gpu(installed, arch, liger, triton, how, expected):
    installed(liger, triton)
    assert choose_fused("auto", tiny_model(arch), GPU, **how) == expected


def test_auto_on_a_cpu_changes_nothing(installed):
    installed(True)
    assert choose_fused("auto", tiny_model(), CPU) == ("none", "auto, on a device of kind cpu")


@pytest.mark.parametrize("wish", ["compile", "none"])
def test_a_wish_is_a_wish(installed, wish):
    installed(True)
    assert choose_fused(wish, tiny_model(), GPU) == (wish, "as asked")


@pytest.mark.parametrize(
    ("arch", "liger", "reason"),
    [
        ("llama", False, "liger-kernel is not installed"),
        ("gpt2", True, "it has no kernels for the architecture gpt2"),
    ],
)
def test_liger_where_it_can_not_be_is_one_line(installed, arch, liger, reason):
    installed(liger)
    with pytest.raises(InputError, match=f"^--fused_layers liger: expected .*, got: {reason}"):
        choose_fused("liger", tiny_model(arch), GPU)


def test_a_broken_liger_is_named(monkeypatch):
    def broken():
        raise ImportError("needs transformers >= 99")

    monkeypatch.setattr(layers, "find_spec", lambda name: True)
    monkeypatch.setattr(layers, "_liger", broken)
    assert why_not_liger(tiny_model(), GPU) == "liger-kernel: needs transformers >= 99"


def test_a_model_that_will_be_moved_is_not_run_where_it_is(monkeypatch):
    """FSDP and ZeRO take it to the GPU later: Triton's kernels can't read a CPU's tensors."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is for GPUs")
    launched, model = launch_nothing(monkeypatch), prepare_model(tiny_model())
    checked = model.packed_checked
    fused.fuse_layers(model)
    assert fused_names(model) and model.packed_checked == checked and not launched
    prepare_model(model)
    assert not launched


# Flags


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(fused_layers="all"), "--fused_layers: expected auto | liger | compile | none, got all"),
        (dict(fused_layers="liger"), "--fused_layers liger: its kernels need a GPU, got a CPU"),
        (
            dict(torch_compile=True, fused_layers="none"),
            "--torch_compile: expected --fused_layers auto or compile beside it, got none",
        ),
        (
            dict(selective_checkpointing=True, fused_layers="compile"),
            "--selective_checkpointing: expected --fused_layers auto or liger or none beside it, got compile",
        ),
        (
            dict(use_liger_kernel=True, fused_layers="compile"),
            "--use_liger_kernel: expected --fused_layers auto or liger beside it, got compile",
        ),
        (
            dict(use_liger_kernel=True, torch_compile=True),
            "--use_liger_kernel: expected without --torch_compile, got both",
        ),
    ],
)  # fmt: skip
def test_refused_by_name(args, message):
    with pytest.raises(InputError) as error:
        SePOConfig(output_dir="-", use_cpu=True, **args)
    assert str(error.value) == message


@pytest.mark.parametrize("method", ["sepo", "dpo"])
def test_compiled_parts_by_their_own_flag(tmp_path, monkeypatch, method):
    """Policy and reference alike, with inductor; and the run knows it."""
    seen = []
    monkeypatch.setattr(fused, "compile_layers", lambda *given: seen.append(given))
    more = dict(reference_model=tiny_model()) if method == "dpo" else {}
    trainer = make_trainer(tmp_path, method=method, fused_layers="compile", **more)
    assert [plugin.backend.value for _, plugin in seen] == ["INDUCTOR"] * (1 + len(more))
    assert seen[0][0] is trainer.model
    assert trainer._flags["fused_layers"] == "compile"
    assert trainer.explained["layers"] == "compile (as asked)"


def test_which_kernels_round_is_of_a_runs_identity_on_a_gpu(tmp_path):
    args = lambda device: SimpleNamespace(fused_layers="liger", device=device)
    assert identity._kernels(args(GPU)) == {"fused_layers": "liger"}
    assert identity._kernels(args(CPU)) == {}
    trainer = make_trainer(tmp_path)
    assert trainer._flags["fused_layers"] == "none"  # what auto came to: a change is said


# Kernels a layer

NONE = {  # what launches none, beside views
    "empty.memory_format", "empty_like.default", "empty_strided.default", "new_empty.default",
    "new_empty_strided.default", "_unsafe_view.default",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Operators that would launch a kernel on a GPU, by name; a product is one, attention too."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        aliases = [found.alias_info for found in func._schema.returns]
        if name not in NONE and all(a is None or a.is_write for a in aliases):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def of_a_layer(monkeypatch, arch: str, *, liger: bool) -> tuple[Counter, Counter]:
    """Kernels of one layer's forward and backward: bfloat16 autocast, weights in float32.

    Liger's are counted where they would be launched, and compute nothing.
    """
    batch = pack([make_segments(pair, Selection("all")) for pair in random_scored_pairs(3)])
    counts, launched = {}, Counter()
    if liger:
        launched = launch_nothing(monkeypatch)
    for number in (1, 2):
        # heads of a width that the native attention takes: one operator, as on a GPU
        model = tiny_model(arch, num_hidden_layers=number, head_dim=32, hidden_size=128)
        prepare_model(model).train()
        if liger:
            use_liger(model)
        found = []
        with Kernels() as forward, torch.autocast("cpu", torch.bfloat16):
            logp = model(batch=batch)
        found.append(forward.count + launched)
        launched.clear()
        loss = logp.sum()
        with Kernels() as backward:
            loss.backward()
        counts[number] = [*found, backward.count + launched]
        launched.clear()
    return tuple(two - one for one, two in zip(counts[1], counts[2], strict=True))


@pytest.mark.native  # other attentions are several operators on a CPU
@pytest.mark.parametrize(
    ("arch", "liger", "forward", "backward"),
    [
        ("llama", False, 48, 88),
        ("qwen3", False, 64, 118),
        ("llama", True, 26, 43),
        ("qwen3", True, 28, 47),
    ],
)
def test_kernels_a_layer(monkeypatch, arch, liger, forward, backward):
    if liger:
        pytest.importorskip("liger_kernel", reason="liger-kernel is for GPUs")
    there, back = of_a_layer(monkeypatch, arch, liger=liger)
    assert there.total() <= forward, there
    assert back.total() <= backward, back
    assert not any("select_backward" in name for name in back)
    assert there["mm.default"] == 7 and back["mm.default"] == 14


# beside what the compiler made: products, attention, and what stays between the parts
EAGER = {
    "aten::mm", "aten::add", "aten::add_", "aten::copy_", "sepo::native_packed_attention",
    "sepo::native_packed_attention_backward",
}  # fmt: skip


def launches(call) -> tuple[object, int]:
    """What it returns, and how many kernels ran; a first micro-batch's gradients are not added."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        result = call()
    names = Counter(event.name for event in found.events())
    ran = sum(n for name, n in names.items() if name in EAGER or "cpp_fused" in name)
    return result, ran - names["torch::autograd::AccumulateGrad"]


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of Dynamo
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of inductor
def test_kernels_a_layer_of_compiled_parts(monkeypatch):
    """As inductor's C++ has them, 48 and 88 without: a GPU's are fused by the same rules."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    monkeypatch.setattr(inductor.cpp, "enable_kernel_profile", True)
    batch = pack([make_segments(pair, Selection("all")) for pair in random_scored_pairs(3)])
    counts = []
    for number in (1, 2):
        torch.compiler.reset()
        model = tiny_model("llama", num_hidden_layers=number, head_dim=32, hidden_size=128)
        prepare_model(model).train()
        layers.compile_layers(model, TorchDynamoPlugin(backend="inductor"))

        def forward(model=model):
            with torch.autocast("cpu", torch.bfloat16):
                return model(batch=batch).sum()

        forward().backward()  # compiles
        loss, there = launches(forward)
        counts.append((there, launches(loss.backward)[1]))
    torch.compiler.reset()
    there, back = (two - one for one, two in zip(*counts, strict=True))
    assert there <= 24 and back <= 34, (there, back)
    assert there > 8 and back > 15  # products and attention alone


@pytest.mark.slow
def test_ligers_kernels_in_the_interpreter():
    """A leg of its own: Triton decides at import whether its kernels are interpreted."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is for GPUs")
    leg = ROOT / "tests/workers/liger_layers.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(leg)],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
