"""The sentiment demo: SePO end to end on a 135M model, with a judge that needs no network."""
