"""A training run's metrics.jsonl as columns."""

import json
import math
from pathlib import Path

from sepo.errors import InputError

FILE = "metrics.jsonl"


def read_run(folder: Path, name: str) -> dict:
    """Every metric of a run: name -> the steps it was logged at, and its values.

    A value that is NaN or infinite becomes None: JSON has no word for it. Raises InputError for a
    folder without metrics.jsonl and for a line that is not a JSON object with a step.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{name}: expected the folder of a training run, found no {FILE}")
    lines = path.read_text(encoding="utf-8").split("\n")
    metrics: dict[str, dict[str, list]] = {}
    for number, line in enumerate(lines[:-1], 1):  # what has no line end yet is being written
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a step"
            ) from error
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                column = metrics.setdefault(key, {"step": [], "value": []})
                column["step"].append(step)
                column["value"].append(value if math.isfinite(value) else None)
    if not metrics:
        raise InputError(f"{path}: expected at least one line of metrics, found none")
    return {"name": name, "metrics": metrics}
