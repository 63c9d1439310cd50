"""The count of type errors is read from mypy's report, whatever it says."""

import importlib.util

import pytest
from processes import ROOT

_spec = importlib.util.spec_from_file_location("type_errors", ROOT / "tools" / "type_errors.py")
type_errors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(type_errors)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Success: no issues found in 3 source files\n", 0),
        ("a.py:1: error: no  [misc]\nFound 1 error in 1 file (checked 3 source files)\n", 1),
        ("Found 470 errors in 61 files (checked 103 source files)", 470),
    ],
)
def test_the_last_line_counts(report, expected):
    assert type_errors.count(report) == expected


@pytest.mark.parametrize("report", ["", "mypy: can't find package 'sepo'"])
def test_a_report_without_a_count_is_an_error(report):
    with pytest.raises(ValueError, match="expected mypy's report"):
        type_errors.count(report)


@pytest.mark.parametrize(("errors", "code"), [(2, 0), (3, 0), (4, 1)])
def test_more_fails_and_fewer_asks_for_a_lower_number(monkeypatch, capsys, errors, code):
    report = f"Found {errors} errors in 1 file (checked 3 source files)"
    done = type("Done", (), {"stdout": report, "stderr": ""})
    monkeypatch.setattr(type_errors, "MOST", 3)
    monkeypatch.setattr(type_errors.subprocess, "run", lambda *args, **options: done)
    assert type_errors.main() == code
    said = capsys.readouterr()
    assert ("lower the number" in said.out) == (errors < 3)
    assert ("at most 3 type errors" in said.err) == (errors > 3)
