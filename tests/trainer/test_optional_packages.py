"""Everything but what needs a package works without it, and that says which one in a line."""

import json
import os
import subprocess
import sys

import pytest
from processes import FOLDERS

OPTIONAL = (
    "datasets", "triton", "peft", "bitsandbytes", "liger_kernel", "flash_attn", "trl", "deepspeed",
    "cut_cross_entropy", "gguf", "vaderSentiment", "sentencepiece",
)  # fmt: skip
# None in sys.modules: importing the package fails, and asking for its spec finds none
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); "
ROW = {"prompt": "a b", "chosen": " c d", "rejected": " e f"}
STEP = """
import tempfile
from sepo import SePOConfig, SePOTrainer
from tiny import random_scored_pairs, tiny_model
with tempfile.TemporaryDirectory() as folder:
    args = SePOConfig(output_dir=folder, use_cpu=True, max_steps=1, report_to="none")
    SePOTrainer(tiny_model(), args, train_dataset=random_scored_pairs(4)).train()
print("trained")
"""
READ = """
import sys
from sepo.data.read.load import is_rows, load_rows
from sepo.errors import InputError
print(len(load_rows(sys.argv[2])), is_rows(list(load_rows(sys.argv[2]))))
for source, split in ((sys.argv[3], None), ("owner/name", None), (sys.argv[2], "train[:1]")):
    try:
        load_rows(source, split=split)
    except InputError as error:
        print(error)
"""


def without(packages, code: str, *args) -> list[str]:
    path = os.pathsep.join(map(str, FOLDERS))
    command = [sys.executable, "-W", "ignore", "-c", BLOCKED + code, ",".join(packages)]
    done = subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("packages", [("datasets",), OPTIONAL], ids=["datasets", "all"])
def test_a_step_is_trained_without(packages):
    assert without(packages, STEP)[-1] == "trained"


def test_what_the_datasets_library_reads_says_so_in_a_line(tmp_path):
    rows, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    rows.write_text(json.dumps(ROW) + "\n")
    table.write_bytes(b"PAR1")
    read, *refused = without(["datasets"], READ, rows, table)
    assert read == "1 True"
    needs = "is read by the datasets library: pip install datasets"
    for what, line in zip(
        (table, "owner/name", f"{rows}, split train[:1],"), refused, strict=True
    ):  # fmt: skip
        assert line.startswith(f"{what} {needs} (")
