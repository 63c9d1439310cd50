"""Which checkpoint of a run is whole."""

import json
from pathlib import Path

from sepo.errors import InputError


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=_step_of_name, reverse=True)
    return next((str(path) for path in found if _is_complete(path)), None)


def completed_step(checkpoint: str | Path | None) -> int:
    """The optimiser step at which training goes on; 0 without a checkpoint."""
    if checkpoint is None:
        return 0
    if not _is_complete(Path(checkpoint)):
        raise InputError(f"{checkpoint} is not a complete checkpoint: no whole trainer_state.json")
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def _is_complete(path: Path) -> bool:
    # Trainer writes its state last: weights, optimiser and generators are there if it is whole
    try:
        json.loads((path / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _step_of_name(path: Path) -> int:
    suffix = path.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else -1
