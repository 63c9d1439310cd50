"""Labels with -100 become rows and targets, and rows and targets become labels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sepo import ops

V = 13


@st.composite
def label_tables(draw):
    B, T = draw(st.integers(0, 4)), draw(st.integers(1, 7))
    value = st.sampled_from([-100, -100, *range(V)])
    table = draw(st.lists(st.lists(value, min_size=T, max_size=T), min_size=B, max_size=B))
    return torch.tensor(table, dtype=torch.int64).view(B, T)


@settings(max_examples=100, deadline=None)
@given(label_tables())
def test_the_shift_is_written_out(labels):
    rows, targets, cu_rows = ops.rows_from_labels(labels)
    B, T = labels.shape
    expected = [
        (b * T + t - 1, int(labels[b, t]))
        for b in range(B)
        for t in range(1, T)
        if labels[b, t] != -100
    ]
    assert list(zip(rows.tolist(), targets.tolist(), strict=True)) == expected
    counts = [sum(row // T == b for row, _ in expected) for b in range(B)]
    assert cu_rows.tolist() == [sum(counts[:b]) for b in range(B + 1)]
    assert (rows.dtype, targets.dtype, cu_rows.dtype) == (torch.int32, torch.int64, torch.int32)


@settings(max_examples=50, deadline=None)
@given(label_tables(), st.randoms())
def test_there_and_back(labels, random):
    rows, targets, _ = ops.rows_from_labels(labels)
    order = list(range(len(rows)))
    random.shuffle(order)
    found = ops.labels_from_rows(rows[order], targets[order], shape=tuple(labels.shape))
    expected = labels.clone()
    expected[:, 0] = -100  # nothing predicts a sequence's first token
    assert torch.equal(found, expected)


def test_it_is_the_mean_loss_of_a_transformers_model():
    """The same number as cross entropy with its own shift, over padded labels."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (3, 6))
    labels[0, :4] = labels[1, 2:] = labels[2] = -100
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    rows, targets, cu_rows = ops.rows_from_labels(labels)
    logp = ops.selected_logprob(hidden.flatten(0, 1), weight, rows, targets)
    torch.testing.assert_close(-logp.mean(), expected, rtol=1e-12, atol=0)
    assert ops.segment_sum(logp, cu_rows)[2] == 0  # a sequence without a label
    ours = torch.autograd.grad(-logp.mean(), (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"expected labels \(B, T\) int64, got \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int32), "expected labels .* got .* torch.int32"),
        (torch.zeros(1, dtype=torch.int64).expand(2**16, 2**15), "fewer than 2..31 positions"),
    ],
)
def test_labels_that_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        ops.rows_from_labels(labels)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 3], "expected rows that predict, got 3, the last of a sequence"),
        ([0, 8], "expected 0 <= rows < 8, got 8"),
        ([-1, 2], "expected 0 <= rows < 8, got -1"),
        ([5, 5], "expected one target a row, got 2 at row 5"),
        ([1], r"expected rows \(M,\) and targets \(M,\), got \(1,\) and \(2,\)"),
    ],
)
def test_rows_that_are_no_labels(rows, message):
    with pytest.raises(ValueError, match=message):
        ops.labels_from_rows(
            torch.tensor(rows, dtype=torch.int32), torch.tensor([1, 2]), shape=(2, 4)
        )
