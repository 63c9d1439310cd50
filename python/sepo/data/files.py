"""Files that appear whole or not at all."""

import os
from pathlib import Path


class Atomic:
    """`with` a temporary name to write to; the file gets its own name once it is on the disk."""

    def __init__(self, file: Path, owner: str):
        self.file, self.temporary = file, file.with_name(f".{file.name}.{owner}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, failed, *_) -> None:
        if failed:
            self.temporary.unlink(missing_ok=True)
            return
        _sync(self.temporary)  # before the rename, or a power cut may leave a name without content
        os.replace(self.temporary, self.file)
        _sync(self.file.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
