"""Which implementations of an operation a test goes through."""

import os

import pytest

from sepo_kernels.devices import INTERPRET


def on_cpu(impls) -> list[str]:
    """Names of those that a CPU must be able to run.

    Not asked of why_not: where the extension is missing the native ones are to fail, unless it
    was left out on purpose. Triton's kernels run in tests/triton_rows.
    """
    absent = {"native"} if os.environ.get("SEPO_EXT") == "none" else set()
    return [i.name for i in impls if i.name not in absent and (i.name != "triton" or INTERPRET)]


def fixture(impls):
    """The fixture `impl`: each name in turn."""
    return pytest.fixture(params=on_cpu(impls), name="impl")(lambda request: request.param)
