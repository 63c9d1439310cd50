"""The truth of every case fits beside what it judges: counted on tensors that have no memory."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.operations import attention, head, kl

GPU = 100e9  # bytes: of the 141 of the smallest GPU that the large cases are for
CASES = [case for module in (head, kl, attention) for case in module.cases("cuda")]


class Live(TorchDispatchMode):
    """The most bytes of storage that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                storage = x.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


class NoNumbers(TorchFunctionMode):
    """Every number that is asked for is 0."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return 0.0 if function is torch.Tensor.item else function(*args, **kwargs or {})


def peak(case) -> int:
    with NoNumbers(), Live() as live:
        inputs = case.inputs("meta")
        for objective in ("weighted", "kl") if isinstance(case, kl.KLCase) else ("weighted",):
            truth = inputs.truth(objective) if hasattr(inputs, "truth") else inputs._truth
            names = inputs.due(objective)
            # what a provider gives, in the dtype it computes in
            given = {name: torch.empty_like(truth[name], dtype=case.dtype) for name in names}
            inputs.errors(given, objective)
            inputs.limits(True, objective)
            del given
    return live.peak


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fits(case):
    assert peak(case) < GPU


def test_what_does_not_fit_is_noticed():
    case = head.HeadCase("too large", 1.0, torch.bfloat16, N=65536, response=65536, V=128256)
    assert peak(case) > GPU


def test_what_is_let_go_of_is_not_counted():
    with Live() as live:
        for _ in range(3):
            torch.empty(1000, dtype=torch.float64, device="meta").exp_()
        kept = torch.empty(1000, dtype=torch.float64, device="meta")
        kept.view(10, 100).add(1)
    assert live.peak == 16000
