"""Every case by suite, as jobs: `gate`, and after the gates of all `ready`, `turn`, `finish`."""

import importlib.util
from fnmatch import fnmatch
from pathlib import Path

import torch

from bench import dtypes
from bench.harness import ROUNDS, CaseJob
from sepo.errors import InputError

SUITES = ("head", "select", "attention", "step")
FULL = "full"
ONLY_SHORT = ("step-short",)
SHORT_ROUNDS = 3  # of its operations: with five a slow machine has no time left for the step
# of a suite, what sepo itself does not need: a machine may have torch alone
NEEDED = ("transformers", "accelerate")


def short(device: str) -> dict[str, tuple[str, ...]]:  # providers by case; (): all
    """Without arguments: a case of each suite, in the dtype that the device multiplies fastest.

    With the peers that two cores have time for, so that the step, which comes last, begins early
    enough in a slow minute too.
    """
    kind = "bf16" if dtypes.fast(device) == torch.bfloat16 else "fp32"
    return {
        f"head-{kind}-30": ("gemm", "sepo", "dense_gathered", "torch_lce", "cce", "liger_simpo"),
        "topk-30": (),
        f"attention-{kind}-8": (),
        "step-short": (),
    }


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
    model: str | None = None,  # these five of whole steps
    data: Path | None = None,
    pairs: int | None = None,
    max_length: int | None = None,
    dtype: str = "bfloat16",  # | "float32"
) -> list:
    """The jobs of a run, in the order in which they are made. Raises InputError for unknown cases."""
    numbers = dict(rounds=rounds, pairs=pairs, max_length=max_length)
    given = {name: number for name, number in numbers.items() if number is not None}
    few = short(device) if not suites and not cases else {}
    usual_rounds = SHORT_ROUNDS if few else ROUNDS
    wanted_suites = SUITES if not suites or FULL in suites else suites
    found = []
    for suite in (s for s in SUITES if s in wanted_suites and not lacking(s)):
        if suite == "step":
            from bench.end_to_end import job

            setting = job.Setting(device, model, data, float32=dtype == "float32")
            steps = job.jobs(setting, providers, given)
            found += [(x, True, x.name in ONLY_SHORT) for x in steps]
        else:
            found += _operations(suite, device, few, providers, rounds or usual_rounds)
    if cases:
        chosen = [x for x, *_ in found if any(fnmatch(x.name, case) for case in cases)]
        lost = [c for c in cases if not any(fnmatch(x.name, c) for x, *_ in found)]
        if lost:
            known = ", ".join(x.name for x, *_ in found)
            raise InputError(f"expected cases of {known}; got {', '.join(lost)}")
    elif few:
        chosen = [x for x, *_ in found if x.name in few]
    else:
        chosen = [x for x, usual, only in found if not only and (usual or FULL in suites)]
    # a run that is cut short has then measured what only a GPU can
    return sorted(chosen, key=lambda job: "large" not in job.name)


def _operations(
    suite: str, device: str, few: dict[str, tuple], providers: tuple[str, ...], rounds: int
) -> list[tuple[CaseJob, bool, bool]]:  # usual, only in the short run
    found = []
    for module, contenders in _contenders(suite):
        for case in module.cases(device):
            wanted = providers or few.get(case.name, ())
            chosen = [p for p in contenders if not wanted or _named(p.name, wanted)]
            # who names providers gets them, however long they take
            named = bool(providers)
            job = CaseJob(case, chosen, device=device, rounds=rounds, slow_too=named)
            if job.providers:
                found.append((job, not case.long, False))
    return found


def _contenders(suite: str) -> list[tuple]:
    """Modules of cases with their providers; what needs transformers is imported when asked for."""
    from bench import providers
    from bench.operations import head, kl, topk

    if suite == "attention":
        from bench.operations import attention, block_mask
        from bench.providers.attention import ATTENTION

        return [(attention, ATTENTION), (block_mask, (block_mask.MASK,))]
    return {"head": [(head, providers.HEAD), (kl, providers.KL)],
            "select": [(topk, providers.TOPK)]}[suite]  # fmt: skip


def _named(name: str, wanted: tuple[str, ...]) -> bool:
    # "sepo" means all of ours
    return any(fnmatch(x, w) for w in wanted for x in (name, name.partition(":")[0]))
