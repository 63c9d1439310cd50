"""Results of several tensors have names, unpack as tuples do, and survive torch.compile."""

import pytest
import torch
from ops.kl_cases import make_inputs

from sepo import ops

LABELS = torch.tensor([[3, -100, 5, 1], [2, 9, -100, -100]])


def two_heads(grad: bool = True):
    i = make_inputs(6, 4, 8, 5, 16)
    i.hidden.requires_grad_(grad)
    return i


def test_fields():
    named = {
        ops.LogprobKL: ("logp", "ref_logp", "kl"),
        ops.SelectedStats: ("logp", "entropy", "log_sum_sq", "mean_logit", "lse", "top1"),
        ops.LabelRows: ("rows", "targets", "cu_rows"),
        ops.SegmentTopk: ("indices", "cu_rows"),
    }
    assert {kind: kind._fields for kind in named} == named


@pytest.mark.parametrize("grad", [False, True])
def test_logprob_kl(grad):
    found = two_heads(grad).call(ops.selected_logprob_kl)
    assert type(found) is ops.LogprobKL
    logp, ref_logp, kl = found
    assert logp is found.logp and ref_logp is found.ref_logp and kl is found.kl
    assert logp.requires_grad == kl.requires_grad == grad and not ref_logp.requires_grad


def test_labels_and_topk():
    rows, targets, cu_rows = found = ops.rows_from_labels(LABELS)
    assert type(found) is ops.LabelRows
    assert rows is found.rows and targets is found.targets and cu_rows is found.cu_rows
    assert found.targets.tolist() == [5, 1, 9]
    offsets = torch.tensor([0, 4, 6])
    found = ops.segment_topk(torch.arange(6.0), offsets, 0.5, "highest")
    assert type(found) is ops.SegmentTopk and found == tuple(found)
    assert found.indices.tolist() == [2, 3, 5] and found.cu_rows.tolist() == [0, 2, 3]


# Dynamo makes an instance of every autograd Function it traces, and torch warns of it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_logprob_kl_compiled(grad):
    i = two_heads(grad)
    torch._dynamo.reset()
    compiled = torch.compile(ops.selected_logprob_kl, fullgraph=True, backend="aot_eager")
    found, expected = i.call(compiled), i.call(ops.selected_logprob_kl)
    assert type(found) is ops.LogprobKL
    assert all(map(torch.equal, found, expected))
    read = torch.compile(
        lambda: i.call(ops.selected_logprob_kl).kl, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(read(), expected.kl)


def test_topk_and_labels_compiled():
    """How many rows there are is data: Dynamo must be allowed to have such sizes."""
    torch._dynamo.reset()
    score, offsets = torch.arange(6.0), torch.tensor([0, 4, 6])
    topk = lambda score, offsets: ops.segment_topk(score, offsets, 0.5, "highest")
    compile = lambda fn: torch.compile(fn, fullgraph=True, backend="aot_eager")
    found = compile(topk)(score, offsets)
    assert type(found) is ops.SegmentTopk
    assert all(map(torch.equal, found, topk(score, offsets)))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = compile(ops.rows_from_labels)(LABELS)
    assert type(found) is ops.LabelRows
    assert all(map(torch.equal, found, ops.rows_from_labels(LABELS)))
