"""Two legs, since Triton decides at import whether its kernels are interpreted.

`pytest tests/triton_rows` compiles every kernel, and starts the other leg as a process of its own;
`TRITON_INTERPRET=1 pytest tests/triton_rows` is that leg: the kernels run, on the CPU.
"""

import pytest

from sepo_kernels.configs import CONFIGS
from sepo_kernels.devices import INTERPRET

collect_ignore_glob = ["test_ahead_of_time.py", "test_leg.py"] if INTERPRET else ["test_interp*.py"]


@pytest.fixture
def tile(monkeypatch):
    """Set the columns of a tile: the interpreter would seldom see a second one otherwise."""

    def set_to(size: int | None):
        for name, config in CONFIGS.items() if size else ():
            monkeypatch.setitem(CONFIGS, name, config._replace(BLOCK_V=size))

    return set_to
