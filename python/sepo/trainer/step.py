"""Say what a method's loss reads of a micro-batch: `sepo.model.reads` reads it."""

from sepo.masks import MASK, ActivationMasks, DrawnMasks, LearnedMasks
from sepo.model.frozen import Reference
from sepo.model.reads import Reads, TokenMasks
from sepo.model.routers import RouterLoss
from sepo.trainer.config import SePOConfig
from sepo.trainer.methods import Method

__all__ = ["MASK", "step_reads"]


def step_reads(
    method: Method,
    args: SePOConfig,
    reference: Reference | None,
    router_loss: RouterLoss | None = None,
) -> Reads:
    """The same for every micro-batch of a run."""
    return Reads(
        method=args.method,
        needed=method.reference,
        reference=reference,
        direction=None if method.direction is None else method.direction(args),
        masks=_masks(method, args),
        rule=None if method.rule is None else method.rule(args),
        router_loss=router_loss,
        budget=args.head_budget,
    )


def _masks(method: Method, args: SePOConfig) -> TokenMasks | None:
    if method.mask == "activation":
        return ActivationMasks(args.mask_norm)
    if method.mask == "learned":
        return DrawnMasks() if args.mask_kind == "random" else LearnedMasks()
    return None
