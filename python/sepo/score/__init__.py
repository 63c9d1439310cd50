"""Score every response token once, and say what a lower precision would do to it."""

from sepo.errors import needs

with needs("train", "sepo.score"):
    from sepo.score.score import KEEP, SAMPLE, score_dataset, score_pairs, shard_name

__all__ = ["KEEP", "SAMPLE", "score_dataset", "score_pairs", "shard_name"]
