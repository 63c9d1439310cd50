"""A rank that trains on this head and on TRL's, and compares: a leg of tests/patch/test_trl.py.

`torchrun --nproc-per-node 2 tests/workers/trl_ranks.py FOLDER`
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from trl_runs import KINDS, assert_same_run, train


def main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    rank = os.environ["RANK"]
    for kind in KINDS:
        ours, theirs = (
            train(folder / f"{kind}-{patched}", kind, patched, per_device_train_batch_size=2)
            for patched in (True, False)
        )
        assert dist.get_backend() == "gloo" and dist.get_world_size() == 2
        assert_same_run(ours, theirs)
    (folder / f"same-{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
