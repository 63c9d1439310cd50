"""Text of the data reaches the terminal as text, whichever command prints it."""

import io
import logging
import sys
import warnings
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from tokenizers_for_tests import plain_tokenizer

from sepo.commands import inspect
from sepo.data.read.read import Report
from sepo.data.types import TokenPair
from sepo.errors import InputError, exit_with_one_line
from sepo.terminal import escaped, release_warnings, say
from sepo.transfer.row import Coverage, SkippedRow

ID = "a\x1b[2J\x1b]0;owned\x07b\r\x9b31m\u202ec"  # clears the screen, sets the title, goes back
SHOWN = r"a\x1b[2J\x1b]0;owned\x07b\r\x9b31m\u202ec"


def test_only_line_breaks_are_left():
    assert escaped(ID) == SHOWN
    assert escaped("é 中 😀\n|") == "é 中 😀\n|"


def test_an_output_of_another_encoding_gets_escapes():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("é\x07", out=out)
    out.flush()
    assert out.buffer.getvalue() == b"\\xe9\\x07\n"


def test_a_refusal_that_names_a_row(capsys):
    def main():
        raise InputError(f"row {ID}: expected a response")

    with pytest.raises(SystemExit):
        exit_with_one_line(main)
    # blanks, the carriage return among them, are one blank in a line
    shown = SHOWN.replace(r"b\r", "b ")
    assert capsys.readouterr().err == f"sepo: error: row {shown}: expected a response\n"


@contextmanager
def as_a_process_shows_them():
    """Where pytest would record them."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def shown(main, capfd) -> tuple[int, list[str]]:
    """Exit code and what stderr got."""
    with as_a_process_shows_them(), pytest.raises(SystemExit) as stop:
        exit_with_one_line(main)
    return stop.value.code, capfd.readouterr().err.splitlines()


def test_warnings_of_others_are_no_second_line_of_a_refusal(capfd):
    def main():
        warnings.warn("a head that is tied", stacklevel=1)
        raise InputError("an adapter on the head")

    assert shown(main, capfd) == (2, ["sepo: error: an adapter on the head"])


def test_what_others_log_is_no_second_line_of_a_refusal(capfd):
    logger, handler = logging.getLogger("another library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False

    def refused():
        logger.warning("a number that is no token")
        raise InputError("no model")

    def goes_well():
        logger.warning("a number that is no token")

    try:
        assert shown(refused, capfd) == (2, ["sepo: error: no model"])
        assert shown(goes_well, capfd) == (0, ["a number that is no token"])
    finally:
        logger.removeHandler(handler)


def test_warnings_of_what_goes_well_are_shown(capfd):
    assert shown(lambda: warnings.warn("at last", stacklevel=1), capfd) == (0, ["warning: at last"])


def test_warnings_are_shown_at_once_when_the_work_begins(capfd):
    def main():
        warnings.warn("before", stacklevel=1)
        assert not capfd.readouterr().err
        release_warnings()
        assert "before" in capfd.readouterr().err
        warnings.warn("meanwhile", stacklevel=1)
        assert "meanwhile" in capfd.readouterr().err
        raise InputError("at last")

    assert shown(main, capfd) == (2, ["sepo: error: at last"])


def test_warnings_of_a_bug_are_shown(capfd):
    def main():
        warnings.warn("a hint", stacklevel=1)
        raise KeyError("a bug")

    with as_a_process_shows_them(), pytest.raises(KeyError):
        exit_with_one_line(main)
    assert "a hint" in capfd.readouterr().err


def test_a_report_of_what_was_read(capsys):
    report = Report(ID, "text", read=1, dropped=Counter({"why": 1}), examples={"why": [ID]})
    say(str(report))
    out = capsys.readouterr().out
    assert f"(pair {SHOWN})" in out and out.startswith(f"{SHOWN} (text)\n")


def test_what_was_not_carried(capsys):
    coverage = Coverage()
    coverage.leave_out(SkippedRow.ORACLE, ID)
    say(str(coverage))
    assert f"(pair {SHOWN})" in capsys.readouterr().out


def test_a_row_as_inspect_shows_it():
    ids = np.array(plain_tokenizer()("ab")["input_ids"], np.int32)
    out = io.StringIO()
    inspect.Show(plain_tokenizer(), out, inspect.USUAL).pair(
        TokenPair(id=ID, prompt=ids, chosen=ids, rejected=ids)
    )
    assert f"pair {SHOWN}: 2 prompt" in out.getvalue() and "\x1b" not in out.getvalue()
