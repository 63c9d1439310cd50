import pytest
import torch

from sepo.attention import flex, varlen


@pytest.fixture
def gpu(monkeypatch):
    """As much of a GPU as the choice asks about."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    monkeypatch.setattr(varlen, "find_spec", lambda name: None)
