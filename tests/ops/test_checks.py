"""What both head operations refuse alike: strides, and index values on the CPU."""

import pytest
import torch
from ops.kl_cases import make_inputs
from torch.autograd import forward_ad

from sepo.ops import (
    segment_mean,
    segment_sum,
    selected_logprob,
    selected_logprob_kl,
    selected_stats,
)

OPERATIONS = {
    "selected_logprob": lambda i: selected_logprob(i.hidden, i.weight, i.rows, i.targets),
    "selected_logprob_kl": lambda i: i.call(selected_logprob_kl),
    "selected_stats": lambda i: selected_stats(i.hidden, i.weight, i.rows, i.targets),
}
index = lambda *values: torch.tensor(values)
REFUSALS = {
    "hidden by columns": (
        dict(hidden=torch.zeros(8, 4).T),
        r"hidden with contiguous rows, got strides \(1, 4\)",
    ),
    "every other column of the weight": (
        dict(weight=torch.zeros(16, 16)[:, ::2]),
        r"weight with contiguous rows, got strides \(16, 2\)",
    ),
    "rows too large": (dict(rows=index(3, 4).int()), "expected 0 <= rows < 4, got 4"),
    "rows negative": (dict(rows=index(-1, 3).int()), "expected 0 <= rows < 4, got -1"),
    "targets too large": (dict(targets=index(0, 16)), "expected 0 <= targets < 16, got 16"),
    "targets negative": (dict(targets=index(-100, 15)), "expected 0 <= targets < 16, got -100"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_refuses_by_name(operation, case):
    wrong, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        OPERATIONS[operation](make_inputs(4, 2, 8, 8, 16)._replace(**wrong))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_first_and_the_last_index_and_a_width_of_one_are_fine(operation):
    i = make_inputs(4, 2, 1, 1, 16)
    i = i._replace(rows=index(0, 3).int(), targets=index(0, 15))
    # a single column has whatever stride its buffer has
    i = i._replace(hidden=torch.zeros(4, 7)[:, :1].T.contiguous().T)
    found = OPERATIONS[operation](i)
    first = found if isinstance(found, torch.Tensor) else found[0]
    assert torch.isfinite(first).all()


FROM_HIDDEN = {
    "selected_logprob": lambda i: selected_logprob(i.hidden, i.weight, i.rows, i.targets),
    "selected_logprob_kl": lambda i: i.call(selected_logprob_kl)[2],
    "selected_stats": lambda i: selected_stats(i.hidden, i.weight, i.rows, i.targets)[1],
    "segment_sum": lambda i: segment_sum(i.hidden.flatten(), index(0, 7, 32)),
    "segment_mean": lambda i: segment_mean(i.hidden.flatten(), index(0, 7, 32)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func imports it
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("operation", FROM_HIDDEN)
def test_a_tangent_is_refused_and_not_lost(operation, gradient):
    """Without a gradient to make, the operator alone runs, and torch would give a tangent of 0."""
    i = make_inputs(4, 2, 8, 8, 16)
    call = lambda hidden: FROM_HIDDEN[operation](i._replace(hidden=hidden))
    hidden = i.hidden.requires_grad_(gradient)
    name = operation.replace("mean", "sum")
    with pytest.raises(
        NotImplementedError, match=f"{name}: expected reverse mode .* got .* tangent"
    ):
        torch.func.jvp(call, (hidden,), (torch.ones_like(hidden),))
    with forward_ad.dual_level():
        expected = call(hidden).detach()  # no tangent: as ever
        with pytest.raises(NotImplementedError, match=name):
            call(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
    assert torch.equal(call(hidden), expected)
