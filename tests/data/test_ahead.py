import threading

import pytest

from sepo.model.ahead import ahead


def names():
    return [t.name for t in threading.enumerate() if t.name.startswith("sepo-next-batch")]


def test_results_come_in_order_and_one_is_made_ahead():
    begun, done = [], [threading.Event() for _ in range(4)]

    def job(i):
        def run():
            begun.append(i)
            done[i].set()
            return i

        return run

    results = ahead(map(job, range(4)))
    assert begun == []  # nothing before somebody asks
    for i in range(4):
        assert next(results) == i
        if i < 3:
            assert done[i + 1].wait(5), "the next is made while this one is used"
        assert begun == list(range(min(i + 2, 4)))
    assert list(results) == [] and names() == []


def test_an_error_comes_where_its_result_would():
    def fail():
        raise ValueError("the second")

    results = ahead([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(ValueError, match="the second"):
        next(results)
    assert names() == []


def test_closed_it_leaves_no_thread():
    results = ahead([lambda: 1] * 9)
    next(results)
    assert len(names()) == 1
    results.close()
    assert names() == []
