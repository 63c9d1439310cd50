"""What the GPU tests ask of the operations over segments, as functions of the device."""

from functools import lru_cache

import torch

from sepo.ops import segment_topk
from sepo_kernels import segment_reduce
from sepo_kernels.segment_reduce import reference as sum_reference
from sepo_kernels.segment_topk import reference

# short and long, empty at both ends, around the widths of a warp and a block
RAGGED = (0, 1, 31, 32, 33, 0, 255, 256, 257, 1000, 1025, 4097, 30_000, 2, 0)
SHORT = (0, 1, 2, 3, 40, 0, 7) * 40  # a narrower block
SPECIAL = (float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0)


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def scores(total: int, dtype) -> torch.Tensor:  # (total,)
    """Ties everywhere, numbers of every magnitude, and in fifty places what is hard to rank."""
    g = torch.Generator().manual_seed(0)
    score = torch.randn(total, generator=g, dtype=torch.float64)
    tied = torch.rand(total, generator=g) < 0.5
    score = torch.where(tied, score.round(), score * torch.logspace(-5, 4, total).double())
    places = torch.randint(max(1, total), (50,), generator=g)
    if total:
        score[places] = torch.tensor(SPECIAL, dtype=torch.float64).repeat(9)[:50]
    return score.to(dtype)


@lru_cache(maxsize=1)
def _definition(lengths, dtype, side, fraction):
    score, cu = scores(sum(lengths), dtype), offsets(lengths)
    return score, cu, reference.segment_topk(score, cu, fraction, side)


def topk(impl, device, lengths, dtype, side, fraction=0.3):
    """Index for index the definition's choice, with the offsets on the CPU and on the device."""
    score, cu, expected = _definition(lengths, dtype, side, fraction)
    for where in {"cpu", device}:
        got = segment_topk(score.to(device), cu.to(where), fraction, side, impl=impl)
        for name, a, b in zip(("index", "cu_rows"), got, expected, strict=True):
            assert a.device.type == device and a.dtype == torch.int32
            assert torch.equal(a.cpu(), b), f"{impl}, {name}, cu_tokens on {where}"


def sums(impl, device, lengths, dtype):
    """Each segment's sum within rounding of the float64 one; a NaN stays at home; the same twice."""
    chosen = {i.name: i for i in segment_reduce.IMPLS}[impl]
    cu = offsets(lengths)
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1)).to(dtype)
    spoilt = next(s for s, length in enumerate(lengths) if length > 30)
    values[int(cu[spoilt]) + 20] = float("nan")
    truth = sum_reference.segment_sum(values.double(), cu)
    size = sum_reference.segment_sum(values.double().abs(), cu)
    here, offset = values.to(device), cu.to(device)
    assert (reason := chosen.why_not(here, offset)) is None, reason
    got = chosen.fwd(here, offset)
    assert got.dtype == dtype and torch.equal(got.isnan().cpu(), truth.isnan())
    error, limit = (got.cpu().double() - truth).abs(), 8 * torch.finfo(dtype).eps * size
    assert (error <= limit)[~truth.isnan()].all(), (error - limit).nan_to_num().max()
    same = chosen.fwd(here, offset)
    assert torch.equal(got.nan_to_num(), same.nan_to_num())

    up = torch.arange(1, len(lengths) + 1, dtype=dtype)
    spread = chosen.bwd(up.to(device), offset, len(values))
    assert torch.equal(spread.cpu(), up.repeat_interleave(cu.diff()))
