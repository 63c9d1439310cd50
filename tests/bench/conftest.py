import gc

import pytest

from bench import measure


@pytest.fixture(autouse=True)
def small_roof(monkeypatch):
    """What a roof is made of takes a second, and says nothing about tiny cases."""
    monkeypatch.setitem(measure.SIDE, "cpu", 32)
    monkeypatch.setitem(measure.SIZE, "cpu", 2**12)


@pytest.fixture(autouse=True)
def quick_collections():
    """The harness collects garbage before each call: a third of a second for all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()
