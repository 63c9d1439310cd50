"""Inputs with a scale for each row, and what the tests of both heads know of them."""

import torch
from ops import kl_cases, logprob_cases

from sepo.ops import selected_logprob, selected_logprob_kl
from sepo_kernels.selected_logprob import reference as one_head
from sepo_kernels.selected_logprob_kl import reference as two_heads

M, V = 70, 101  # of the fused kernels, a whole tile of rows and a narrow one


class One:
    """selected_logprob, and what its tests know of it."""

    fn = staticmethod(selected_logprob)
    reference = staticmethod(one_head.selected_logprob)
    schedules = ("save", "recompute", "frozen_head", "no_grad")

    @staticmethod
    def inputs(dtype, M=M):
        return logprob_cases.make_inputs(40, M, 24, V, dtype=dtype, bias=True)

    @staticmethod
    def run(fn, inputs, schedule, dtype, **options):
        return logprob_cases.run(fn, inputs, schedule=schedule, dtype=dtype, **options)

    @staticmethod
    def budget(schedule, dtype, impl):
        return logprob_cases.budget_for(schedule, V, dtype, 3.0, impl=impl)


class Two:
    """selected_logprob_kl, and what its tests know of it."""

    fn = staticmethod(selected_logprob_kl)
    reference = staticmethod(two_heads.selected_logprob_kl)
    schedules = ("save", "save frozen", "recompute", "frozen_head", "no_grad")

    @staticmethod
    def inputs(dtype, M=M):
        return kl_cases.make_inputs(40, M, 24, 17, V, dtype=dtype, bias=True)

    @staticmethod
    def run(fn, inputs, schedule, dtype, **options):
        return kl_cases.run(fn, inputs, schedule=schedule, dtype=dtype, **options)

    @staticmethod
    def budget(schedule, dtype, impl):
        return kl_cases.budget_for(schedule, V, dtype)


def spread(dtype) -> torch.Tensor:  # (M,)
    """Temperatures from 0.4 to 2.5, in no order."""
    order = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    values = torch.logspace(-0.4, 0.4, M)[order]
    return values.to(torch.promote_types(dtype, torch.float32))
