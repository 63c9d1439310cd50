"""A training run's metrics.jsonl as columns."""

import json
import os
from pathlib import Path

from sepo.errors import InputError

FILE = "metrics.jsonl"
MOST_STEPS = 1 << 53
LARGEST = 1e300  # a chart's height is a difference, and must be finite too


def read_run(folder: Path, name: str) -> dict:
    """Every metric of a run: name -> the steps it was logged at, and its values.

    A value that is NaN, infinite or so large that nothing can be drawn of it becomes None. Raises
    InputError for a folder without metrics.jsonl, for one that can't be read, and for a line that is
    not a JSON object with a step.
    """
    path = folder / FILE
    if not os.path.isfile(path):
        raise InputError(f"{name}: expected the folder of a training run, found no {FILE}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected lines of JSON, got {error}") from error
    metrics: dict[str, dict[str, list]] = {}
    for number, line in enumerate(lines[:-1], 1):  # what has no line end yet is being written
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            if not 0 <= step < MOST_STEPS:
                raise ValueError
        except (ValueError, OverflowError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:60]}"
            ) from None
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                column = metrics.setdefault(key, {"step": [], "value": []})
                column["step"].append(step)
                column["value"].append(value if abs(value) < LARGEST else None)
    if not metrics:
        raise InputError(f"{path}: expected at least one line of metrics, found none")
    return {"name": name, "metrics": metrics}
