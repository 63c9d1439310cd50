"""Say what a method's loss reads of a micro-batch, and refuse a step that is not finite.

`sepo.model.reads` does the reading.
"""

from collections.abc import Sequence

from sepo.errors import InputError
from sepo.masks import MASK, ActivationMasks, DrawnMasks, LearnedMasks
from sepo.model.frozen import Reference
from sepo.model.reads import Reads, TokenMasks
from sepo.model.routers import RouterLoss
from sepo.trainer.config import SePOConfig
from sepo.trainer.methods import Method

__all__ = ["MASK", "not_finite", "step_reads"]


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


def not_finite(step: int, whose: str, rows: Sequence[str], whole: str) -> InputError:
    """The error of a step whose loss or gradient is not; `rows` are its pairs, or those to blame."""
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return InputError(
        f"step {step}: expected a finite loss and gradient, got the {whose} pair {shown}; {whole}: "
        "look at the data, or try a lower --learning_rate"
    )
