"""Every case by suite, as jobs: `gate`, and after the gates of all `ready`, `turn`, `finish`."""

import importlib.util
from fnmatch import fnmatch
from pathlib import Path

from bench.harness import ROUNDS, CaseJob
from sepo.errors import InputError

SUITES = ("head", "select", "attention", "step")
FULL = "full"
# without arguments: one case of each suite, the peers that two cores have time for, so that the
# step, which comes last, begins early enough in a slow minute too
SHORT = {
    "head-bf16-30": ("gemm", "sepo", "dense_gathered", "torch_lce", "cce", "liger_simpo"),
    "topk-30": (),
    "attention-bf16-8": (),
    "step-short": (),
}
ONLY_SHORT = ("step-short",)
SHORT_ROUNDS = 3  # of its operations: with five a slow machine has no time left for the step
# of a suite, what sepo itself does not need: a machine may have torch alone
NEEDED = ("transformers", "accelerate", "datasets")


def lacking(suite: str) -> str:
    """What this machine lacks for it, or ""."""
    if suite not in ("attention", "step"):
        return ""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


def jobs(
    suites: tuple[str, ...],  # of SUITES and FULL; (): the short run
    *,
    device: str,
    cases: tuple[str, ...] = (),  # patterns of names; (): all of the suites but the long ones
    providers: tuple[str, ...] = (),  # patterns of names; (): all
    rounds: int | None = None,
    model: str | None = None,  # these four of whole steps
    data: Path | None = None,
    pairs: int | None = None,
    max_length: int | None = None,
    float32: bool = False,
) -> list:
    """The jobs of a run, in the order in which they are made. Raises InputError for unknown cases."""
    numbers = dict(rounds=rounds, pairs=pairs, max_length=max_length)
    given = {name: number for name, number in numbers.items() if number is not None}
    short = not suites and not cases
    usual_rounds = SHORT_ROUNDS if short else ROUNDS
    wanted_suites = SUITES if not suites or FULL in suites else suites
    found = []
    for suite in (s for s in SUITES if s in wanted_suites and not lacking(s)):
        if suite == "step":
            from bench.end_to_end import job

            setting = job.Setting(device, model, data, float32=float32)
            steps = job.jobs(setting, providers, given)
            found += [(x, True, x.name in ONLY_SHORT) for x in steps]
        else:
            found += _operations(suite, device, short, providers, rounds or usual_rounds)
    if cases:
        chosen = [x for x, *_ in found if any(fnmatch(x.name, case) for case in cases)]
        lost = [c for c in cases if not any(fnmatch(x.name, c) for x, *_ in found)]
        if lost:
            known = ", ".join(x.name for x, *_ in found)
            raise InputError(f"expected cases of {known}; got {', '.join(lost)}")
    elif short:
        chosen = [x for x, *_ in found if x.name in SHORT]
    else:
        chosen = [x for x, usual, only in found if not only and (usual or FULL in suites)]
    # a run that is cut short has then measured what only a GPU can
    return sorted(chosen, key=lambda job: "large" not in job.name)


def _operations(
    suite: str, device: str, short: bool, providers: tuple[str, ...], rounds: int
) -> list[tuple[CaseJob, bool, bool]]:  # usual, only in the short run
    found = []
    for module, contenders in _contenders(suite):
        for case in module.cases(device):
            wanted = providers or (SHORT.get(case.name, ()) if short else ())
            chosen = [p for p in contenders if not wanted or _named(p.name, wanted)]
            job = CaseJob(case, chosen, device=device, rounds=rounds)
            if job.providers:
                found.append((job, not case.long, False))
    return found


def _contenders(suite: str) -> list[tuple]:
    """Modules of cases with their providers; what needs transformers is imported when asked for."""
    from bench import providers
    from bench.operations import head, kl, topk

    if suite == "attention":
        from bench.operations import attention
        from bench.providers.attention import ATTENTION

        return [(attention, ATTENTION)]
    return {"head": [(head, providers.HEAD), (kl, providers.KL)],
            "select": [(topk, providers.TOPK)]}[suite]  # fmt: skip


def _named(name: str, wanted: tuple[str, ...]) -> bool:
    # "sepo" means all of ours
    return any(fnmatch(x, w) for w in wanted for x in (name, name.partition(":")[0]))
