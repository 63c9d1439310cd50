"""Selection as trainers write it: one torch.topk a segment."""

import torch

from bench.provider import Provider


def _run(inputs) -> dict:
    cu = inputs.cu_tokens.tolist()
    index, cu_rows = [], [0]
    for s, (start, stop) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        K = inputs.count(stop - start)
        top = inputs.score[start:stop].topk(K, largest=s % 2 == 0).indices
        index.append(top.sort().values + start)
        cu_rows.append(cu_rows[-1] + K)
    return {"index": torch.cat(index), "cu_rows": torch.tensor(cu_rows)}


TOPK = (
    Provider("topk_loop", _run, objective="any tie", note=lambda inputs: "any of equal scores"),
)
