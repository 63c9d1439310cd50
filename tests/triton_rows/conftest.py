"""Two legs, since Triton decides at import whether its kernels are interpreted.

`pytest tests/triton_rows` compiles every kernel, and starts the other leg as a process of its own;
`TRITON_INTERPRET=1 pytest tests/triton_rows` is that leg: the kernels run, on the CPU.
"""

import functools
import inspect

import pytest

from sepo_kernels.configs import CONFIGS
from sepo_kernels.devices import INTERPRET

collect_ignore_glob = ["test_ahead_of_time.py", "test_leg.py"] if INTERPRET else ["test_interp*.py"]


@pytest.fixture(autouse=True, scope="session")
def language_looked_through_once():
    """At each call of a device function the interpreter looks for what it has to replace in Triton's
    language: a third of the time of these tests. What it finds there does not change.
    """
    if not INTERPRET:
        return
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def builtins(place) -> list[tuple[str, object]]:
        return [(k, v) for k, v in inspect.getmembers(place) if core.is_builtin(v)]

    def replace(place, *scope):
        for name, member in builtins(place):
            if getattr(place, name) is member:
                interpreter._patch_attr(place, name, member, *scope)

    interpreter._patch_builtin = replace


@pytest.fixture
def tile(monkeypatch):
    """Set the columns of a tile: the interpreter would seldom see a second one otherwise."""

    def set_to(size: int | None):
        for name, config in CONFIGS.items() if size else ():
            monkeypatch.setitem(CONFIGS, name, config._replace(BLOCK_V=size))

    return set_to
