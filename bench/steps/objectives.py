"""What the contenders minimise, with the same settings for all."""

from torch import Tensor

from sepo.data.segments import make_segments
from sepo.data.selection import Selection
from sepo.data.types import ScoredPair
from sepo.losses import dpo_loss, sepo_loss, simpo_loss
from sepo.ops import segment_mean, segment_sum
from sepo.trainer.methods import METHODS

FRACTION = 0.3
MASK_L1 = 0.001
# as SePOConfig takes them
SETTINGS = {
    "dpo": dict(beta=0.1),
    "simpo": dict(beta=2.0, gamma_beta_ratio=0.5),
    "sepo": dict(gamma=2.0, margin=0.5, fraction=FRACTION),
    "tdpo2": dict(beta=0.1, alpha=0.5),
    "sparsepo": dict(beta=0.1, mask_l1=MASK_L1),
}


def segments(objective: str, pairs: list[ScoredPair]) -> list:
    """What the method reads of each pair: prompt, chosen, rejected, truncated."""
    positions = METHODS[objective].positions
    return [make_segments(pair, Selection(positions, fraction=FRACTION)) for pair in pairs]


def loss(
    objective: str,
    logp: Tensor,  # (M,) of the selected tokens
    ref_logp: Tensor | None,  # (M,)
    cu_rows: Tensor,  # (S + 1,) int32
) -> Tensor:  # ()
    """Mean over the pairs, of dpo, simpo or sepo."""
    if objective == "dpo":
        assert ref_logp is not None
        return dpo_loss(segment_sum(logp - ref_logp, cu_rows), beta=0.1).mean()
    score = segment_mean(logp, cu_rows)
    if objective == "simpo":
        return simpo_loss(score, beta=2.0, margin=1.0).mean()
    return sepo_loss(score, gamma=2.0, margin=0.5).mean()
