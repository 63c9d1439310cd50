"""The program that compute-sanitizer watches: every CUDA kernel over segments, on little data."""

import os
import sys

import torch

LENGTHS = [
    (0, 1, 31, 33, 0, 257, 40, 0),  # 256 threads a segment
    (3000, 0, 2999, 4001),  # 1024
]
SIDES = ("highest", "lowest", "alternate")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def run(device: str) -> int:
    """Number of calls, each compared with what PyTorch does in its place."""
    from sepo.ops import segment_topk
    from sepo_kernels import segment_reduce

    g = torch.Generator().manual_seed(0)
    native, offsets = (i for i in segment_reduce.IMPLS if i.name in ("native", "offsets"))
    done = 0
    for lengths in LENGTHS:
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        M = int(cu[-1])
        there = cu.to(device)
        for dtype in DTYPES:
            score = (torch.randn(M, generator=g) * 4).round().div(4).to(dtype)
            for side in SIDES:
                got = segment_topk(score.to(device), cu, 0.3, side, impl="native")
                expected = segment_topk(score, cu, 0.3, side, impl="sorting")
                assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
                done += 1
        for dtype in DTYPES[:2]:
            # whole numbers, of which sums are exact in any order
            values = torch.randint(-9, 9, (M,), generator=g).to(dtype)
            up = torch.arange(len(lengths), dtype=dtype)
            total = native.fwd(values.to(device), there).cpu()
            assert torch.equal(total, offsets.fwd(values, cu))
            spread = native.bwd(up.to(device), there, M).cpu()
            assert torch.equal(spread, offsets.bwd(up, cu, M))
            done += 2
    return done


if __name__ == "__main__":
    # read at the first allocation: out of a cache, beyond a tensor there is memory all the same
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    print(f"{run(sys.argv[1] if len(sys.argv) > 1 else 'cuda')} calls of CUDA kernels are right")
