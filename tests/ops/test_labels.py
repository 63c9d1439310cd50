"""Labels with -100 become rows and targets, and rows and targets become labels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sepo import ops

V = 13
F64 = dict(dtype=torch.float64)


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


@pytest.fixture
def states():
    """hidden (3, 6, 8), weight (V, 8), bias (V,), labels (3, 6): the last row has none."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, **F64).requires_grad_()
    labels = torch.randint(V, (3, 6), generator=g)
    labels[0, :4] = labels[1, 2:] = labels[2] = -100
    return normal(3, 6, 8), normal(V, 8), normal(V), labels


def dense_logp(hidden, weight, bias, labels, *, ignore_index=-100, scale=1.0, softcap=None):
    """Through all logits and cross entropy's own ignore_index."""
    logits = hidden @ weight.T * scale + bias
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    how = dict(ignore_index=ignore_index, reduction="none")
    logp = -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], **how)
    return F.pad(logp, (1, 0))  # nothing predicts a sequence's first token


@pytest.mark.parametrize("options", [{}, dict(scale=0.7, softcap=3.0, impl="chunked")])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_logprob_of_labels_is_cross_entropy_where_the_labels_are(states, options, ignore_index):
    hidden, weight, bias, labels = states
    labels = labels.masked_fill(labels == -100, ignore_index)
    named = dict(options, ignore_index=ignore_index)
    ours = ops.logprob_from_labels(hidden, weight, labels, bias=bias, **named)
    named.pop("impl", None)
    theirs = dense_logp(hidden, weight, bias, labels, **named)
    assert ours.shape == labels.shape and ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), **F64)
    grads = [torch.autograd.grad(x, (hidden, weight, bias), upstream) for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


def test_logprob_of_labels_against_the_gather_of_a_log_softmax(states):
    """What TRL's selective_log_softmax and its like return, which shift and mask outside."""
    hidden, weight, bias, labels = states
    logp = (hidden @ weight.T + bias)[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    theirs = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * mask
    ours = ops.logprob_from_labels(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(ours[:, 1:], theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.sum(1), theirs.sum(1), rtol=1e-12, atol=1e-14)


def test_logprob_of_labels_is_what_the_segments_reduce(states):
    hidden, weight, _, labels = states
    rows, targets, cu_rows = ops.rows_from_labels(labels)
    flat = ops.selected_logprob(hidden.flatten(0, 1), weight, rows, targets)
    logp = ops.logprob_from_labels(hidden, weight, labels)
    count = (labels[:, 1:] != -100).sum(1).clamp(min=1)
    torch.testing.assert_close(logp.sum(1) / count, ops.segment_mean(flat, cu_rows))


def test_gradcheck_of_logprob_from_labels(states):
    hidden, weight, bias, labels = states
    op = lambda h, w, b: ops.logprob_from_labels(h, w, labels, bias=b)
    assert torch.autograd.gradcheck(op, (hidden, weight, bias))


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_logprob_of_labels_under_compile(states):
    """The number of rows is data, where Dynamo breaks the graph; the result is the same."""
    hidden, weight, bias, labels = states
    torch._dynamo.reset()
    compiled = torch.compile(ops.logprob_from_labels, backend="aot_eager")
    found, expected = (
        fn(hidden, weight, labels, bias=bias) for fn in (compiled, ops.logprob_from_labels)
    )
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(x.sum(), (hidden, weight, bias)) for x in (found, expected)]
    assert all(map(torch.equal, *grads))


def test_labels_that_are_all_ignored_give_a_differentiable_zero(states):
    hidden, weight, _, labels = states
    logp = ops.logprob_from_labels(hidden, weight, torch.full_like(labels, -100))
    assert not logp.any()
    logp.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_bfloat16_states_give_float32(states):
    hidden, weight, _, labels = (x.detach() for x in states)
    ours = ops.logprob_from_labels(hidden.bfloat16(), weight.bfloat16(), labels)
    exact = [x.bfloat16().double() for x in (hidden, weight)]
    assert ours.dtype == torch.float32
    theirs = ops.logprob_from_labels(*exact, labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 6), (3, 6)), r"hidden \(B, T, D\) and labels \(B, T\), got \(3, 6\) and \(3, 6\)"),
        (((3, 5, 8), (3, 6)), r"got \(3, 5, 8\) and \(3, 6\)"),
        (((18, 8), (3, 6)), r"got \(18, 8\) and \(3, 6\)"),
        (((3, 6, 9), (3, 6)), r"hidden \(N, D\) and weight \(V, D\), got \(18, 9\) and \(13, 8\)"),
    ],
)
def test_states_and_labels_that_do_not_fit(states, shapes, message):
    hidden, labels = shapes
    with pytest.raises(ValueError, match=message):
        ops.logprob_from_labels(torch.zeros(hidden, **F64), states[1], torch.ones(labels).long())


def test_a_label_that_is_no_token(states):
    """Padding by another number than ignore_index is refused, not trained on."""
    hidden, weight, _, labels = states
    with pytest.raises(ValueError, match="expected 0 <= targets < 13, got -100"):
        ops.logprob_from_labels(hidden, weight, labels, ignore_index=-1)


def test_another_number_for_what_is_ignored(states):
    *_, labels = states
    other = labels.masked_fill(labels == -100, -1)
    found = ops.rows_from_labels(other, ignore_index=-1)
    assert all(map(torch.equal, found, ops.rows_from_labels(labels)))
    shape, kept = tuple(labels.shape), found[:2]
    there = ops.labels_from_rows(*kept, shape=shape, ignore_index=-1)
    assert torch.equal(there[:, 1:], other[:, 1:])


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
