"""Which implementations of an operation a test goes through."""

import pytest
from native_kernels import LACKING

from sepo_kernels.devices import INTERPRET


def on_cpu(impls) -> list[str]:
    """Names of those that a CPU can run here. Triton's kernels run in tests/triton_rows."""
    absent = {"native"} if LACKING else set()
    return [i.name for i in impls if i.name not in absent and (i.name != "triton" or INTERPRET)]


def parameters(impls) -> list:
    """The same for a test of each; the native ones too, which are skipped where they are lacking."""
    marks = {"native": pytest.mark.native}
    return [
        pytest.param(i.name, marks=marks.get(i.name, ()))
        for i in impls
        if i.name != "triton" or INTERPRET
    ]


def fixture(impls):
    """The fixture `impl`: each name in turn."""
    return pytest.fixture(params=parameters(impls), name="impl")(lambda request: request.param)
