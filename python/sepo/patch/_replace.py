"""Replacing attributes of other people's objects, and putting them back."""

from collections.abc import Callable
from importlib import metadata
from types import TracebackType
from typing import Any, Self

from packaging.specifiers import SpecifierSet

from sepo.errors import InputError

_ABSENT = object()


class Patch:
    """Remember what was put in the place of what. `undo()`, or the end of a `with` block, puts it back."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, name, before, after
        self._at_undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module, class or object, and remember what its own dict had."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._replaced.append((owner, name, before, value))

    def at_undo(self, call: Callable[[], None]) -> None:
        """Remember what takes something else away: a hook, say."""
        self._at_undo.append(call)

    def undo(self) -> None:
        """Put everything back; once it is back, do nothing.

        Raises InputError, and puts nothing back, where someone else has replaced it since: theirs
        would be lost.
        """
        for owner, name, _, after in self._replaced:
            if vars(owner).get(name, _ABSENT) is not after:
                where = getattr(owner, "__name__", type(owner).__name__)
                raise InputError(
                    f"{where}.{name}: expected what this patch put there, got another's; "
                    "undo that one first"
                )
        while self._replaced:
            owner, name, before, _ = self._replaced.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        while self._at_undo:
            self._at_undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.undo()


def check_version(package: str, known: str) -> None:
    """Raise InputError for a package that is missing, or of a version outside `known` (PEP 440)."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise InputError(f"expected {package} {known}, got none installed") from None
    if not SpecifierSet(known).contains(version, prereleases=True):
        raise InputError(
            f"{package} {version} is not known to sepo.patch: expected {package} {known}"
        )
