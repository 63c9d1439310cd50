"""Who is measured, for each operation, in the order of the tables."""

from bench.providers import cce, dense, liger, loop, ours, products, torch_lce, trl

HEAD = (
    *products.HEAD, *ours.HEAD, *dense.HEAD, *torch_lce.HEAD, *cce.HEAD, *trl.HEAD, *liger.HEAD,
)  # fmt: skip
KL = (*products.KL, *ours.KL, *dense.KL)
TOPK = (*ours.TOPK, *loop.TOPK)
