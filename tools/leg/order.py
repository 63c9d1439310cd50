"""What the leg does, in order: what costs most to lose comes first, and each case is alone."""

import os
import re
import shutil
import sys
from pathlib import Path

from bench import jobs
from bench.operations import head, high_entropy, k_targets, kl, stats, topk
from tools.leg.stages import ROOT, Stage

ENVIRONMENT = "environment"
GROUPS = (
    ENVIRONMENT, "build", "head", "kl", "select", "attention", "score", "step", "tests", "sanitizer",
)  # fmt: skip
# case, model and seconds; of a shape the weights are random and the pairs drawn, and no model named
# is SmolLM2 where it is at hand, else its shape
STEPS = {
    "step llama-1b": ("step", "llama-1b-shape", 90),
    "step llama-8b": ("step", "llama-8b-shape-8-layers", 120),
    "step smollm2": ("step", None, 60),
    "step-tdpo2 smollm2": ("step-tdpo2", None, 60),
    "step-sparsepo smollm2": ("step-sparsepo", None, 60),
}
LARGE, SMALL = 35, 15  # seconds of a case: its truth, compilation, the rounds of all its providers
ON_HOST = {"flex-mask-8k": 8, "flex-mask-32k": 8}  # nothing is compiled
AGAIN = 3
TESTS = {"test_gpu_heads.py": 150, "test_gpu_attention.py": 60}  # seconds; the others FEW
FEW, FLEX = 30, 120
MARKED = re.compile(r"^(pytestmark|@pytest).*mark\.gpu", re.M)
# of the extension, by --kernel-name, which was --kernel-regex before CUDA 12.3: torch's own kernels are
# not ours to watch
KERNELS = "kns=segments", "kns=select_tokens"


def stages(path: Path, only: tuple[str, ...] = ()) -> tuple[Stage, ...]:
    """Of all groups, or of the environment, which brings the rivals, and some."""
    found = [*_setting_up(path), *_cases(path), *_steps(path), *_tests(), *_sanitizers()]
    wanted = (ENVIRONMENT, *only) if only else GROUPS
    return tuple(stage for stage in found if stage.group in wanted)


def _setting_up(path: Path) -> list[Stage]:
    leg = sys.executable, str(Path("tools") / "gpu.py")
    # --force: an extension without CUDA kernels may lie there, and be newer than its sources
    build = (sys.executable, "setup.py", "build_ext", "--inplace", "--force")
    return [
        Stage("environment", ENVIRONMENT, 10, (*leg, "environment", "--json", str(path))),
        Stage("wheels", ENVIRONMENT, 20, (*leg, "wheels")),
        Stage("build", "build", 60, build),
    ]


def _cases(path: Path) -> list[Stage]:
    heads = [("head", module) for module in (stats, k_targets, high_entropy)]
    suites = [("head", head), ("kl", kl), *heads, ("select", topk)]
    absent = jobs.lacking("attention")  # and "score", which needs the same
    if not absent:
        from bench.operations import attention, block_mask, score

        suites += [("attention", attention), ("attention", block_mask), ("score", score)]
    found = []
    for group, module in suites:
        cases = sorted(module.cases("cuda"), key=lambda case: "large" not in case.name)
        for case in cases:
            suite = "--suite", case.suite, "--case", case.name
            seconds = LARGE if "large" in case.name else ON_HOST.get(case.name, SMALL)
            found.append(Stage(case.name, group, seconds, _bench(path, *suite), again=AGAIN))
    if absent:
        found += [Stage(name, name, 0, (), absent) for name in ("attention", "score")]
    return found


def _steps(path: Path) -> list[Stage]:
    absent = jobs.lacking("step")
    options = "--suite", "step", "--pairs", "16", "--rounds", "5"
    found = []
    for name, (case, model, seconds) in STEPS.items():
        what = "--case", case, *(("--model", model) if model else ())
        command = _bench(path, *options, *what)
        found.append(Stage(name, "step", seconds, command, absent, again=AGAIN))
    trace = sys.executable, str(Path("tools") / "leg" / "trace.py")
    return [*found, Stage("trace", "step", 40, trace, absent)]


def _bench(path: Path, *options: str) -> tuple[str, ...]:
    where = "--device", "cuda", "--json", str(path), "--figure", "none"
    return (sys.executable, str(Path("bench") / "run.py"), *options, *where)


def _tests() -> list[Stage]:
    """A file a process; flex, of which each kernel is compiled for seconds, after all others."""
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-rs")
    # warnings of another build of torch are not ours, and would be errors
    pytest += ("-p", "no:cacheprovider", "-W", "default", "--durations=5")
    files = sorted((ROOT / "tests" / "gpu").glob("test_gpu_*.py"))
    files = [file for file in files if MARKED.search(file.read_text())]
    found = []
    for file in files:
        seconds, where = TESTS.get(file.name, FEW), str(file.relative_to(ROOT))
        command = (*pytest, "-k", "not flex", where)
        found.append(Stage(file.stem, "tests", seconds, command, again=AGAIN))
    where = [str(file.relative_to(ROOT)) for file in files]
    return [*found, Stage("flex", "tests", FLEX, (*pytest, "-k", "flex", *where), again=AGAIN)]


def _sanitizers() -> list[Stage]:
    tool = find_sanitizer()
    absent = "" if tool else "compute-sanitizer is not on this machine"
    program = (sys.executable, "tests/gpu/sanitized.py")
    # the API errors are torch's own questions to the driver
    asked = {"memcheck": (40, ("--report-api-errors", "no")), "racecheck": (30, ())}
    kernels = [word for kernel in KERNELS for word in ("--kernel-name", kernel)]
    watch = (sys.executable, str(Path("tools") / "leg" / "watched.py"), tool or "")
    return [
        Stage(
            name, "sanitizer", seconds, absent=absent,
            command=(*watch, "--tool", name, *options, *kernels, *program),
        )
        for name, (seconds, options) in asked.items()
    ]  # fmt: skip


def find_sanitizer() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places])
    )
