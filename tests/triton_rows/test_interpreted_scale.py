"""A scale for each row in the Triton kernels, run on the CPU by Triton's interpreter."""

import pytest
import torch
from numerics import assert_as_accurate
from ops.scale_cases import One, Two, spread

FEW = 10  # rows: the interpreter is slow
CASES = [(head, schedule) for head in (One, Two) for schedule in head.schedules]
each_case = pytest.mark.parametrize(("head", "schedule"), CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_case
def test_equal_scales_give_the_bits_of_one(tile, head, schedule, dtype):
    tile(32)
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
