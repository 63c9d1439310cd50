"""What both ways minimise."""

MASK_L1 = 0.001
# as SePOConfig takes them
SETTINGS = {
    "tdpo2": dict(beta=0.1, alpha=0.5),
    "sparsepo": dict(beta=0.1, mask_l1=MASK_L1),
}
