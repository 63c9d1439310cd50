"""Which library is loaded, and what is said where none can be: one line, never a signal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENVIRONMENT

from sepo_kernels import extension

RELEASE = extension.RELEASE.replace(".", "_")
OTHER = "2_12" if RELEASE != "2_12" else "2_11"


@pytest.mark.parametrize("asked, best, level", [
    ("default", "AVX2", "DEFAULT"), ("AVX2", "AVX2", "AVX2"), ("avx512", "AVX512_BF16", "AVX512"),
])  # fmt: skip
def test_sepo_cpu_names_a_lesser_level(monkeypatch, asked, best, level):
    monkeypatch.setattr(extension, "level_of_this_cpu", lambda: best)
    monkeypatch.setenv("SEPO_CPU", asked)
    assert extension.choose_level() == level


@pytest.mark.parametrize("asked, said", [
    ("AVX512", "expected at most AVX2, which this CPU has, got AVX512"),
    ("AVX3", "expected one of DEFAULT, AVX2, AVX512, AVX512_BF16, got AVX3"),
])  # fmt: skip
def test_sepo_cpu_names_what_is_not_here(monkeypatch, asked, said):
    monkeypatch.setattr(extension, "level_of_this_cpu", lambda: "AVX2")
    monkeypatch.setenv("SEPO_CPU", asked)
    with pytest.raises(ValueError, match=f"^SEPO_CPU: {said}$"):
        extension.choose_level()


@pytest.mark.parametrize("command", ["env", "train"])
def test_a_command_says_a_wrong_sepo_cpu_in_one_line(command):
    done = subprocess.run(
        [sys.executable, "-m", "sepo.commands.main", command],
        env=ENVIRONMENT | {"SEPO_CPU": "AVX3"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sepo: error: SEPO_CPU: expected one of DEFAULT,")
    assert line.endswith("got AVX3")


def elf_of_another_machine() -> bytes:
    program = bytearray(Path(sys.executable).resolve().read_bytes()[:4096])
    assert program[:4] == b"\x7fELF"
    program[18:20] = (0x16).to_bytes(2, "little")  # e_machine: S390
    return bytes(program)


@pytest.mark.parametrize("files, reason", [
    ({}, "the native extension is not here"),
    ({f"_C_default_torch_{OTHER}.abi3.so": b"any"},
     f"built for torch {OTHER.replace('_', '.')}, this is torch {extension.RELEASE}"),
    ({f"_C_default_torch_{RELEASE}.abi3.so": b"no library at all, but long enough to be one"},
     "cannot be loaded"),
    ({f"_C_default_torch_{RELEASE}.abi3.so": b""}, "cannot be loaded"),
    ({f"_C_default_torch_{RELEASE}.abi3.so": elf_of_another_machine}, "cannot be loaded"),
    ({f"_C_avx512_torch_{RELEASE}.abi3.so": b"any"}, "built for avx512, this CPU has AVX2"),
], ids=["none", "other torch", "garbage", "empty", "other machine", "other level"])  # fmt: skip
def test_what_cannot_be_loaded_is_a_reason(monkeypatch, tmp_path, files, reason):
    if sys.platform != "linux" and any(map(callable, files.values())):
        pytest.skip("needs ELF programs")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content() if callable(content) else content)
    monkeypatch.setattr(extension, "HERE", tmp_path)
    found = extension.load("AVX2")
    assert reason in found and len(found.splitlines()) == 1
    if "loaded" in reason:  # by which file, and what the loader says of it
        assert os.fspath(tmp_path) in found and "Could not load" not in found
