"""Read a file or a hub id as token pairs, and report what became of its rows."""

from sepo.data.read.read import BATCH, REPEATED_ID, PairSet, Report, named_rows, read_pairs

__all__ = ["BATCH", "REPEATED_ID", "PairSet", "Report", "named_rows", "read_pairs"]
