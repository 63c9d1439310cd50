"""The sentiment demo: SePO end to end on a 135M model, with a judge that needs no network."""

from pathlib import Path

DATA = Path(__file__).parent / "data"  # its pairs and openings, which a wheel holds too
