"""The training script by its path: its folder comes first on sys.path, and hides nothing."""

import subprocess
import sys

import pytest
from processes import ENVIRONMENT, ROOT

SCRIPT = str(ROOT / "python" / "sepo" / "train.py")


@pytest.mark.parametrize(
    "launcher",
    [[], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]],
    ids=["python", "accelerate launch"],
)
def test_the_script_starts_by_its_path(launcher):
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, "--method", "nothing", "--output_dir", "x"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("sepo: error: ")]
    assert len(errors) == 1 and "nothing" in errors[0], done.stderr[-2000:]
