"""A scale for each row in the Triton kernels, run on the CPU by Triton's interpreter."""

import pytest
import torch
from numerics import assert_as_accurate
from ops.scale_cases import One, Two, spread

FEW = 10  # rows: the interpreter is slow
CASES = [(head, schedule) for head in (One, Two) for schedule in head.schedules]
each_case = pytest.mark.parametrize(("head", "schedule"), CASES)


@each_case
def test_equal_scales_give_the_bits_of_one(tile, head, schedule):
    tile(32)
    dtype = torch.float32
    inputs, budget = head.inputs(dtype, FEW), head.budget(schedule, dtype, "triton")
    options = dict(softcap=3.0, budget=budget, impl="triton")
    one, found = (
        head.run(head.fn, inputs, schedule, dtype, scale=scale, **options)
        for scale in (0.7, torch.full((FEW,), 0.7))
    )
    assert all(torch.equal(found[name], value) for name, value in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_as_accurate_as_plain_pytorch(tile, head, schedule, dtype):
    tile(32)
    inputs, scale = head.inputs(dtype, FEW), spread(dtype)[:FEW]
    options = dict(budget=head.budget(schedule, dtype, "triton"), impl="triton")
    ours = head.run(head.fn, inputs, schedule, dtype, scale=scale, **options)
    truth = head.run(head.reference, inputs, schedule, torch.float64, scale=scale.double())
    plain = head.run(head.reference, inputs, schedule, dtype, scale=scale)
    for name, value in truth.items():
        assert_as_accurate(ours[name], plain[name], value, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["save", "recompute"])
def test_the_reference_has_its_own(tile, schedule, dtype):
    """Beside the policy's one number, and beside the policy's of every row; capped, or one of both."""
    tile(32)
    inputs, each = Two.inputs(dtype, FEW), spread(dtype)[:FEW]
    own = dict(budget=Two.budget(schedule, dtype, "triton"), impl="triton")
    double = lambda x: x.double() if isinstance(x, torch.Tensor) else x
    for scale, caps in ((0.8, {}), (each.flip(0), dict(softcap=3.0, ref_softcap=torch.inf))):
        options = dict(scale=scale, ref_scale=each, **caps)
        exact = {name: double(x) for name, x in options.items()}
        ours = Two.run(Two.fn, inputs, schedule, dtype, **options, **own)
        truth = Two.run(Two.reference, inputs, schedule, torch.float64, **exact)
        plain = Two.run(Two.reference, inputs, schedule, dtype, **options)
        for name, value in truth.items():
            assert_as_accurate(ours[name], plain[name], value, what=name)
