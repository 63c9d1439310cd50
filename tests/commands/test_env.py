"""`sepo env` says what a bug report needs, also where something is missing or broken."""

from importlib.metadata import version

import torch
import transformers

import sepo
from sepo.commands import env as command
from sepo.commands import main as cli
from sepo.ops import explain_selected_logprob
from sepo_kernels import devices, extension


def lines(capsys) -> dict[str, str]:
    cli.run(["env"])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"sepo {sepo.__version__}, Python 3.")
    return dict(line.split(": ", 1) for line in rest)


def test_a_working_installation(capsys):
    found = lines(capsys)
    assert found["torch"] == version("torch")
    assert found["transformers"] == transformers.__version__
    assert {"trl", "peft", "flash-attn", "nvcc", "driver", "compiler", "CUDA"} <= set(found)
    assert f"{torch.get_num_threads()} CPU threads" in found["devices"]
    fast, speed = found["cpu, fast in"].split(", bfloat16 at ")
    assert fast == str(devices.fast_dtype("cpu")).removeprefix("torch.")
    assert speed == f"{devices.bfloat16_speed('cpu'):.2g} times float32's rate"
    for dtype in ("bfloat16", "float32"):
        x = torch.empty(1, 1, dtype=getattr(torch, dtype))
        none = torch.empty(0, dtype=torch.int32)
        impl = explain_selected_logprob(x, x, none, none.long()).impl
        assert found[f"cpu, {dtype}"].startswith(f"head {impl}")
        assert "attention " in found[f"cpu, {dtype}"]
    if extension.MISSING is None:
        levels = f"{extension.LEVEL} of {extension.level_of_this_cpu()}, with"
        tiles = "" if extension.BFLOAT16_TILES else "out"
        said = found["extension on cpu"]
        assert said.startswith(f"{levels}{tiles} bfloat16 tiles; built: default")
        assert said.endswith(f"for torch {extension.RELEASE}")
    else:
        assert found["extension on cpu"] == extension.MISSING


def test_without_an_extension_or_a_compiler(capsys, monkeypatch):
    reason = "the native extension is not here ; build it with: make"
    monkeypatch.setattr(extension, "MISSING", reason)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    found = lines(capsys)
    assert found["extension on cpu"] == found["extension on cuda"] == reason
    assert found["compiler"] == found["nvcc"] == found["driver"] == "not found"


def test_where_torch_cannot_be_loaded(capsys, monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file\nmore lines")

    monkeypatch.setattr(command, "_torch", broken)
    found = lines(capsys)
    said = "ImportError: libcudart.so.13: cannot open shared object file"
    assert found["devices"] == found["CUDA"] == found["cpu, float32"] == said
    assert found["cpu, fast in"] == said
    assert found["torch"] == version("torch")  # what is installed is known all the same
