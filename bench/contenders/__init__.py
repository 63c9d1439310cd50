"""Who is measured, for each operation, in the order of the tables."""

from bench.contenders import ours, peers, plain

HEAD = (plain.GEMM, *ours.HEAD, *plain.HEAD, *peers.HEAD)
KL = (plain.GEMM, *ours.KL, *plain.KL, *peers.KL)
STATS = (plain.GEMM, *ours.STATS, *plain.STATS)
TOPK = (*ours.TOPK, *plain.TOPK)
