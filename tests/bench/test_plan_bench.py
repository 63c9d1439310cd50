import numpy as np
import pytest

from sepo.cost.batches import measures
from sepo.data import StepPlan


def test_measures_by_hand():
    lengths = np.array([8, 10, 9, 2])
    plan = StepPlan(np.arange(4), (((1,), (3,)), ((2,), (0,))))
    found = measures(plan, lengths, lengths * 2.0, budget=10)
    mean = 29 / 2
    assert found == pytest.approx((2, 29 / 40, 19 / 20, 17 / mean, (10 + 8) / mean))


def test_nothing_but_the_last():
    plan = StepPlan(np.arange(2), (((0,),), ((1,),)))
    count, full, but_last, *_ = measures(plan, np.array([3, 5]), np.ones(2), budget=8)
    assert (count, full) == (1, 0.5) and np.isnan(but_last)
