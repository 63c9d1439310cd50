"""What a bare machine with torch lacks: one folder of wheels, carried there and installed from it.

    make gpu-wheels, or: python tools/leg/wheels.py [--python 3.12] [names beside CARRIED]

make gpu puts those that can't be imported yet into a folder of its own, runs/gpu-site: the machine's
Python stays as it is, and nothing is looked up anywhere.
"""

import argparse
import email
import importlib.metadata
import platform
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS, SITE = ROOT / "runs" / "gpu-wheels", ROOT / "runs" / "gpu-site"
RIVALS = "trl", "liger-kernel", "cut-cross-entropy"
# and what these need beside what torch, transformers and sepo have brought; most of it pure Python
CARRIED = (
    *RIVALS, "datasets", "dill", "multiprocess", "fsspec", "xxhash", "requests", "urllib3", "idna",
    "charset-normalizer", "certifi", "pandas", "python-dateutil", "six", "pytest", "pluggy", "iniconfig",
)  # fmt: skip
# newest first; and wheels for any machine
LINUX = tuple(f"manylinux_2_{n}" for n in (28, 27, 24, 17)) + ("manylinux2014",)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default="3.12", help="the GPU machine's")
    parser.add_argument("--machine", default=platform.machine(), help="the GPU machine's")
    parser.add_argument("more", nargs="*", help="quack-kernels, say, and all that it needs")
    args = parser.parse_args(argv)
    platforms = [word for p in LINUX for word in ("--platform", f"{p}_{args.machine}")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    pip += ["--only-binary", ":all:", "--python-version", args.python, *platforms]
    names = *CARRIED, *args.more
    code = subprocess.call([*pip, "-c", ROOT / "constraints.txt", "-d", WHEELS, *names])
    size = sum(file.stat().st_size for file in WHEELS.glob("*.whl"))
    print(f"{WHEELS}: {len(list(WHEELS.glob('*.whl')))} wheels, {size / 1e6:.1f} MB")
    return code


def install(wheels: Path = WHEELS, site: Path = SITE) -> int:
    """Those of the folder that this Python does not have, into `site`; PYTHONPATH names it.

    Left out, and said, is what needs another version than this Python has, and what needs that:
    half a package is found, and then can't be imported.
    """
    files = {file.name.partition("-")[0].replace("_", "-"): file for file in wheels.glob("*.whl")}
    names = sorted(files)
    lacking = [name for name in names if not is_here(name)]
    print(f"carried: {', '.join(names) or 'nothing'}; lacking: {', '.join(lacking) or 'nothing'}")
    left_out = unmet({name: files[name] for name in lacking})
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    lacking = [name for name in lacking if name not in left_out]
    if not lacking:
        return 0
    # a dependency that nobody carried is named by whatever can't be imported for want of it
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    return subprocess.call(
        [*pip, "--no-index", "--find-links", wheels, "--target", site, "--upgrade", *lacking]
    )


def unmet(wheels: dict[str, Path]) -> dict[str, str]:
    """Name -> what keeps a wheel from working with what this Python has."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:  # of a machine with torch alone, which has no versions that could clash
        return {}
    needed = {name: list(map(Requirement, _requires(file))) for name, file in wheels.items()}
    found: dict[str, str] = {}
    while True:
        more = {}
        for name in needed.keys() - found.keys():
            for one in needed[name]:
                if one.marker is not None and not one.marker.evaluate({"extra": ""}):
                    continue
                if (other := canonicalize_name(one.name)) in found:
                    more[name] = f"it needs {other}"
                elif is_here(other):
                    here = importlib.metadata.version(other)
                    if not one.specifier.contains(here, prereleases=True):
                        more[name] = f"it needs {other} {one.specifier}, got {here}"
        if not more:
            return dict(sorted(found.items()))
        found |= more


def _requires(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])


def is_here(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
