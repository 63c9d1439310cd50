"""This library's head in the place of TRL's, under every trainer of the process.

TRL gives a model a forward that returns log-probabilities and statistics of the labels. The head
inside is one function of tensors; distillation's divergence is another. They are replaced, and
nothing around them: shifts, masks, metrics and losses stay TRL's.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from sepo.errors import InputError
from sepo.model.forward import head
from sepo.patch._replace import Patch, check_version
from sepo.patch._trl_divergence import Divergence
from sepo.patch._trl_head import LabelStatistics, entropy_is_rewarded

KNOWN = "==1.16.*"
_GIVEN_A_HEAD = ("sft", "dpo", "kto", "grpo", "rloo")
_DIVERGENCE = "ChunkedDivergenceFunction"
_GRPO_FORWARD = "_get_per_token_logps_and_entropies"


def trl() -> Patch:
    """Put this library's head under TRL's SFT, DPO, KTO, GRPO, RLOO and distillation trainers.

    Their losses, gradients and metrics stay what they were, to the rounding of float32. Only rows
    with a label go through the head, on a CPU too, where TRL computes all. It holds for trainers
    made before and after, until `undo()` or the end of a `with` block:

        with sepo.patch.trl():
            DPOTrainer(model, args=args, train_dataset=pairs).train()

    Of distillation every divergence is computed here: the KL at `beta` 0 and 1, and between them the
    generalised Jensen-Shannon divergence.

    With `use_liger_kernel` the layers are Liger's and the head is this one. TRL itself refuses
    Liger's fused cross entropy in these trainers.

    Returns:
        Patch: its `undo()`, or the end of a `with` block, gives TRL its head back.

    Raises:
        InputError: for a TRL version that is not known, and where the head is no longer TRL's own:
            it is patched already. A trainer made under the patch raises it for a model whose head
            is not one linear layer, has an adapter, or is one of peft's `modules_to_save`. A step
            raises it under DeepSpeed ZeRO-3.
    """
    check_version("trl", KNOWN)
    utils = importlib.import_module("trl.trainer.utils")
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    trainers = [importlib.import_module(f"trl.trainer.{name}_trainer") for name in _GIVEN_A_HEAD]
    grpo = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    distillation = importlib.import_module("trl.trainer.distillation_trainer")
    _check_own(utils, "_ChunkedLogProbFunction", kernels.ChunkedLogProbFunction)
    _check_own(distillation, _DIVERGENCE, divergence.ChunkedDivergenceFunction)
    patch = Patch()
    patch.replace(utils, "_ChunkedLogProbFunction", LabelStatistics)
    patch.replace(distillation, _DIVERGENCE, Divergence)
    for module in (utils, distillation):
        patch.replace(module, "_use_triton", _everywhere)  # where it is true TRL selects rows
    add = _refusing(utils.add_fused_lm_head)
    for module in (utils, *trainers):
        patch.replace(module, "add_fused_lm_head", add)
    patch.replace(grpo, _GRPO_FORWARD, _rewarding(getattr(grpo, _GRPO_FORWARD)))
    return patch


def _everywhere(device: torch.device) -> bool:
    return True


def _refusing(add: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(add)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        head(model)  # raises for one that is more than its weight
        add(model, *args, **kwargs)

    return add_fused_lm_head


def _rewarding(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the head know at once what GRPO's trainer knows: whether the entropy is in its loss."""

    @functools.wraps(forward)
    def with_entropy(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = entropy_is_rewarded.set(self._entropy_bonus_enabled)
        try:
            return forward(self, *args, **kwargs)
        finally:
            entropy_is_rewarded.reset(token)

    return with_entropy


def _check_own(module: Any, name: str, own: Any) -> None:
    found = getattr(module, name)
    if found is own:
        return
    if found.__module__ == LabelStatistics.__module__:
        raise InputError("trl is patched already: expected TRL's own head, got sepo.patch's")
    where = f"{found.__module__}.{found.__qualname__}"
    raise InputError(f"trl is patched by others: expected its own {own.__name__}, got {where}")
