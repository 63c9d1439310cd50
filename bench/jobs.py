"""Every case by suite, as jobs: `gate`, and after the gates of all `ready`, `turn`, `finish`."""

import importlib.util
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch

from bench import precision
from bench.contender import Contender
from bench.harness import ROUNDS, Job
from sepo.errors import InputError

SUITES = ("head", "select", "attention", "score", "step")
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
    kind = "bf16" if precision.fast(device) == torch.bfloat16 else "fp32"
    return {
        f"head-{kind}-30": ("gemm", "sepo", "dense_gathered", "torch_lce", "cce", "liger_simpo"),
        "topk-30": (),
        f"attention-{kind}-8": (),
        "step-short": (),
    }


def lacking(suite: str) -> str:
    """What this machine lacks for it, or ""."""
    if suite not in ("attention", "score", "step"):
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
    **steps,  # of whole steps: as steps.case.cases takes them
) -> list[Job]:
    """The jobs of a run, in the order in which they are made. Raises InputError for unknown cases."""
    few = short(device) if not suites and not cases else {}
    usual_rounds = rounds or (SHORT_ROUNDS if few else ROUNDS)
    wanted_suites = SUITES if not suites or FULL in suites else suites
    steps |= dict(wanted=providers, rounds=rounds)
    found = []
    for suite in (s for s in SUITES if s in wanted_suites and not lacking(s)):
        for case, contenders in _cases(suite, device, steps):
            wanted = providers or few.get(case.name, ())
            chosen = [c for c in contenders if not wanted or _named(c.name, wanted)]
            job = Job(
                case, chosen, device=device, rounds=case.rounds or usual_rounds,
                slow_too=suite == "step" or bool(providers),  # who names them gets them
            )  # fmt: skip
            if suite == "step" or job.contenders:
                found.append(job)
    if cases:
        chosen = [x for x in found if any(fnmatch(x.name, case) for case in cases)]
        lost = [c for c in cases if not any(fnmatch(x.name, c) for x in found)]
        if lost:
            known = ", ".join(x.name for x in found)
            raise InputError(f"expected cases of {known}; got {', '.join(lost)}")
    elif few:
        chosen = [x for x in found if x.name in few]
    else:
        usual = lambda x: x.name not in ONLY_SHORT and (FULL in suites or not x.case.long)
        chosen = [x for x in found if usual(x)]
    # a run that is cut short has then measured what only a GPU can
    return sorted(chosen, key=lambda job: "large" not in job.name)


def _cases(suite: str, device: str, steps: dict) -> Iterator[tuple[Any, tuple[Contender, ...]]]:
    """With all their contenders; what needs transformers is imported when asked for."""
    if suite == "step":  # whose contenders are made with the model
        from bench.steps.case import cases

        return ((case, ()) for case in cases(**steps))
    if suite == "attention":
        from bench.contenders.attention import ATTENTION
        from bench.operations import attention, block_mask

        found = [(attention, ATTENTION), (block_mask, (block_mask.MASK,))]
    elif suite == "score":
        from bench.operations import score

        found = [(score, score.SCORE)]
    else:
        from bench import contenders
        from bench.operations import head, high_entropy, k_targets, kl, stats, topk

        heads = [(head, contenders.HEAD), (kl, contenders.KL), (stats, contenders.STATS)]
        heads += [(k_targets, contenders.K_TARGETS), (high_entropy, contenders.HIGH_ENTROPY)]
        found = {"head": heads, "select": [(topk, contenders.TOPK)]}[suite]
    return ((case, who) for module, who in found for case in module.cases(device))


def _named(name: str, wanted: tuple[str, ...]) -> bool:
    # "sepo" means all of ours
    return any(fnmatch(x, w) for w in wanted for x in (name, name.partition(":")[0]))
