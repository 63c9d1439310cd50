"""Commands started in odd ways: without a stdout, a home or a folder, in another locale, for a head."""

import json
import re
import subprocess
import sys

import pytest
from processes import ENVIRONMENT
from training_run import make_run

SEPO = f"exec {sys.executable} -m sepo.commands.main"
INSPECT = f"{SEPO} inspect --dataset_name HOME/pairs.jsonl --model_name_or_path HOME/model"
NOTHING = f"{SEPO} inspect --dataset_name HOME/nothing.jsonl --model_name_or_path HOME/model"
REPORT = f"{SEPO} report HOME/store --model_name_or_path HOME/model"
GONE = "mkdir HOME/gone && cd HOME/gone && rmdir ../gone &&"
PLAIN = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
FULL = "sepo: error: stdout: can't be written: No space left on device"
REMOVED = "sepo: error: the current folder: expected one to start in, got"
CASES = {  # what a shell is told -> exit code, the one line on stderr, words on stdout
    f"{SEPO} env >/dev/full": (2, FULL, ""),
    f"{INSPECT} >/dev/full": (2, FULL, ""),
    f"{REPORT} --json >/dev/full": (2, FULL, ""),
    f"{INSPECT} >&-": (0, "", ""),
    f"{SEPO} env >&-": (0, "", ""),
    f"{INSPECT} <&-": (0, "", "pair 0"),
    f"{INSPECT} 2>&-": (0, "", "pair 0"),
    f"{NOTHING} 2>&-": (2, "", ""),
    f"{NOTHING} >&- <&-": (2, "sepo: error: no such file", ""),
    f"({INSPECT[5:]} --rows 500; echo $? >HOME/code) | head -c 20": (0, "", "pair 0: "),
    f"{GONE} {INSPECT}": (2, REMOVED, ""),
    f"{GONE} {REPORT}": (2, REMOVED, ""),
    f"cd HOME/ && {SEPO} inspect --dataset_name ./store/../pairs.jsonl --model_name_or_path model": (0, "", "pair 0"),
    f"unset HOME; {INSPECT}": (0, "", "pair 0"),
    f"export HOME=/nonexistent; {INSPECT}": (0, "", "pair 0"),
    f"export {PLAIN}; {INSPECT}": (0, "", r"pair caf\xe9"),
    f"export {PLAIN}; {SEPO} inspect --dataset_name HOME/café --model_name_or_path HOME/model": (2, "sepo: err", ""),
    f"export PYTHONIOENCODING=utf-16; {NOTHING}": (2, "", ""),  # of which no line can be told
    f"export TZ=Nowhere/Else COLUMNS=x LINES=-1 TERM=; {INSPECT}": (0, "", "pair 0"),
    f"ulimit -n 40; {NOTHING}": (2, "sepo: error: no such file", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    make_run(path)
    row = dict(prompt="w3 w4", chosen="w5 w6", rejected="w7")
    rows = [row, row | {"id": "café"}, *[row] * 600]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", CASES)
def test_an_odd_start(command, home, figures):
    code, line, words = CASES[command]
    done = subprocess.run(
        ["bash", "-c", command.replace("HOME/", f"{home}/")],
        env=ENVIRONMENT, capture_output=True, timeout=120,
    )  # fmt: skip
    out, error = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    lines = [one for one in error.splitlines() if one.strip() and not re.search(r"\d+%\|", one)]
    figures("odd starts", tried=1, tracebacks=int("Traceback" in error))
    assert done.returncode == code, error
    assert len(lines) == bool(line) and error.startswith(line) or "utf-16" in command, error
    assert words in out
    if "head -c" in command:
        assert (home / "code").read_text() == "141\n"
