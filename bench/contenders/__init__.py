"""Who is measured, for each operation, in the order of the tables."""

from bench.contenders import ours, peers, plain
from bench.contenders.k_targets import K_TARGETS

HEAD = (plain.GEMM, *ours.HEAD, *plain.HEAD, *peers.HEAD)
KL = (plain.GEMM, *ours.KL, *plain.KL, *peers.KL)
STATS = (plain.GEMM, *ours.STATS, *plain.STATS, *peers.STATS)
HIGH_ENTROPY = (plain.GEMM, *ours.HIGH_ENTROPY, *plain.HIGH_ENTROPY, *peers.HIGH_ENTROPY)
TOPK = (*ours.TOPK, *plain.TOPK)

__all__ = ["HEAD", "HIGH_ENTROPY", "KL", "K_TARGETS", "STATS", "TOPK"]
