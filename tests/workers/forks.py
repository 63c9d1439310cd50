"""Run training jobs one after another, each in processes of its own, importing everything once.

forks.py JOBS.json: a list of
  {"argv": arguments of sepo train, "ranks": 1, "environment": {},
   "phase": where a rank stops and is killed (phases.py), or null,
   "after": seconds after its first line of the log when all ranks are killed, or null,
   "step": true: not a run but fsdp2_step.py, which writes to --output_dir,
   "code": the exit code of rank 0 that is expected of one not killed: 0, or 1 after an exception}
JOBS.json gets what each job left: {"code": exit code of rank 0, "checkpoint": the last whole one}.
Nothing runs in the parent but this file: a process whose autograd has run must not fork.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from processes import free_port
from tiny import tiny_model
from workers import fsdp2_step
from workers.phases import PHASES, stop_in_phase

from sepo import train
from sepo.trainer.checkpoints import last_checkpoint


def main(path: str) -> None:
    torch.set_num_threads(1)
    tiny_model()  # transformers imports a model's class when it is asked for
    jobs = json.loads(Path(path).read_text())
    for job in jobs:
        job["left"] = run(job)
        expected = [-signal.SIGKILL] if killed(job) else [job.get("code", 0)]
        if job.get("after") is not None:
            expected.append(0)  # it was faster than the kill
        if job["left"]["code"] not in expected:
            print(Path(output_dir(job), "..", "forks.log").resolve().read_text(), file=sys.stderr)
            sys.exit(f"{job}")
    Path(path).write_text(json.dumps(jobs))


def killed(job: dict) -> bool:
    return job.get("phase") is not None or job.get("after") is not None


def run(job: dict) -> dict:
    ranks, paused = job.get("ranks", 1), Path(output_dir(job)).parent / "paused"
    paused.unlink(missing_ok=True)
    common = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1")
    common |= dict(MASTER_PORT=free_port(), **job.get("environment", {}))
    pids, began = [], time.time_ns()
    for rank in range(ranks):
        here = common | dict(RANK=rank, LOCAL_RANK=rank) if ranks > 1 else {}
        pid = os.fork()
        if pid == 0:
            work(job, rank, {**job.get("environment", {}), **here}, paused)
        pids.append(pid)
    if job.get("phase") is not None:
        while not paused.exists() and running(pids):
            time.sleep(0.005)
        if paused.exists():
            os.kill(pids[PHASES[job["phase"]].rank if ranks > 1 else 0], signal.SIGKILL)
    elif job.get("after") is not None:
        log = Path(output_dir(job)) / "metrics.jsonl"
        while not (log.exists() and log.stat().st_mtime_ns > began) and running(pids):
            time.sleep(0.005)
        time.sleep(job["after"])
    if killed(job):  # torchrun too ends the others when one is gone
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if job.get("phase") is not None and not paused.exists():
        codes[0] = f"{codes} before the phase"
    last = last_checkpoint(output_dir(job))
    return {"code": codes[0], "checkpoint": None if last is None else Path(last).name}


def work(job: dict, rank: int, environment: dict, paused: Path) -> None:
    """A rank, in a forked process: it does not return."""
    signal.alarm(200)  # paused, and its parent gone
    log = os.open(paused.parent / "forks.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        os.environ.update({name: str(value) for name, value in environment.items()})
        if "SEPO_TESTS_SHARD_ON_A_CPU" in environment:
            from workers.cpu_fsdp import let_accelerate_shard_on_a_cpu

            let_accelerate_shard_on_a_cpu()
        if job.get("phase") is not None:
            stop_in_phase(job["phase"], rank if job.get("ranks", 1) > 1 else None, paused)
        fsdp2_step.main(output_dir(job)) if job.get("step") else train.main(job["argv"])
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def running(pids: list[int]) -> bool:
    """Whether all of them still run; none is reaped."""
    kind = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return not any(os.waitid(os.P_PID, pid, kind) for pid in pids)


def output_dir(job: dict) -> str:
    return job["argv"][job["argv"].index("--output_dir") + 1]


if __name__ == "__main__":
    main(*sys.argv[1:])
