"""A Trainer whose model carries SparsePO's learned mask while it is trained.

The mask is the policy's submodule, so that DDP and FSDP2 treat its parameters as any other; it is
put aside while the model is saved or loaded, and lies in a file of its own beside it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import set_seed

from sepo.masks import MASK, SparseMask, decayed, load_into, num_layers, save_mask
from sepo.model.base import Base, base_of
from sepo.trainer.config import SePOConfig
from sepo.trainer.resume import ResumableTrainer


def add_mask(model: nn.Module, reference: nn.Module, args: SePOConfig) -> None:
    """Give the policy a new mask on the reference's layers, in float32 whatever the policy is in."""
    set_seed(args.seed)  # Trainer does so later, when the mask is drawn
    base = _base(model)
    mask = SparseMask(
        num_layers(reference),
        base_of(reference).config.get_text_config(decoder=True).hidden_size,
        independent=args.independent_masks,
        layernorm=args.mask_layernorm,
        binary=args.mask_kind == "binary",
    )
    dtype = torch.promote_types(base.dtype, torch.float32)
    setattr(base, MASK, mask.to(base.device, dtype))


class MaskedTrainer(ResumableTrainer):
    _warned = False

    @property
    def mask(self) -> SparseMask | None:
        return getattr(_base(self.model), MASK, None)

    def warn_of_shut_masks(self, means: dict[str, float]) -> None:
        """A ReLU that is 0 for every token has no gradient: such a mask stays shut."""
        shut = [name for name in ("reward", "kl") if means.get(f"mask/{name}/sparsity") == 1.0]
        if shut and self.mask is not None and not self._warned and self.is_world_process_zero():
            self._warned = True
            logging.getLogger(__name__).warning(
                f"the {' and the '.join(shut)} mask is 0 for every token, and has no gradient any "
                "more: try a lower --mask_learning_rate or --mask_l1, or another --seed"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, and of its own for the mask: a learning rate, and decay of its weights alone."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        mask = getattr(_base(model or self.model), MASK, None)
        if mask is None or not fresh:
            return optimizer
        own = {id(p) for p in mask.parameters()}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        weights = list(decayed(mask).values())
        rest = [p for p in mask.parameters() if all(p is not w for w in weights)]
        rate = self.args.mask_learning_rate
        rate = self.args.learning_rate if rate is None else rate
        for parameters, decay in ((weights, self.args.mask_weight_decay), (rest, 0.0)):
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": decay})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        mark, tensors = f"{MASK}.", None
        if state_dict is not None:  # gathered from shards; the mask's entries are among them
            tensors = {k.rpartition(mark)[2]: v for k, v in state_dict.items() if mark in k}
            state_dict = {k: v for k, v in state_dict.items() if mark not in k}
        with self._mask_aside() as mask:
            super()._save(output_dir, state_dict=state_dict)
        if mask is not None and self.args.should_save:
            save_mask(mask, output_dir or self.output_dir, tensors=tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # shards hold the mask too
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with self._mask_aside() as mask:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if mask is not None:
            load_into(mask, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        with self._mask_aside() as mask:
            super()._load_best_model()
        best = self.state.best_model_checkpoint
        if mask is not None and best is not None:
            load_into(mask, best)

    @contextmanager
    def _mask_aside(self) -> Iterator[SparseMask | None]:
        """The model without its mask, as others know it."""
        base, mask = _base(self.model), self.mask
        if mask is not None:
            delattr(base, MASK)
        try:
            yield mask
        finally:
            if mask is not None:
                setattr(base, MASK, mask)


def _base(model: nn.Module) -> Base:
    """The transformers model inside a PeftModel, or inside DDP."""
    return base_of(getattr(model, "module", model))
