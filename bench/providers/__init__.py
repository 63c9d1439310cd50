"""Who is measured, for each operation, in the order of the tables."""

from bench.providers import cce, dense, liger, loop, ours, products, quack, torch_lce, trl

HEAD = (
    *products.HEAD, *ours.HEAD, *dense.HEAD, *torch_lce.HEAD, *cce.HEAD, *trl.HEAD, *liger.HEAD,
    *quack.HEAD,
)  # fmt: skip
KL = (*products.KL, *ours.KL, *dense.KL, *trl.KL)
TOPK = (*ours.TOPK, *loop.TOPK)
