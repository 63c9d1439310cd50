"""The same checks on a CPU: that they run, and that they notice what is wrong."""

import pytest
from gpu import method_checks as checks

from sepo.masks import kinds


@pytest.mark.parametrize("case", checks.CASES)
def test_values_and_gradients(case):
    checks.agrees(case, "cpu")


@pytest.mark.parametrize("case", ["sparsepo", "mapo"])
def test_a_mask_of_other_tokens_is_noticed(case, monkeypatch):
    checks.expected(case)
    late = lambda read: (
        lambda *of: (lambda hidden, kept: (hidden, kept.roll(1, dims=1)))(*read(*of))
    )
    for name in ("layer_states", "layer_activations"):
        monkeypatch.setattr(kinds, name, late(getattr(kinds, name)))
    with pytest.raises(AssertionError, match="error"):
        checks.agrees(case, "cpu")
