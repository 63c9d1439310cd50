"""Runs that are begun and go on with something changed."""

from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig
from tiny import random_scored_pairs, tiny_model

from sepo import SePOConfig, SePOTrainer

PAIRS = random_scored_pairs(8)
KINDS = {  # a run that is begun -> its arguments
    "sepo": dict(method="sepo"),
    "cached": dict(method="dpo"),
    "live": dict(method="dpo", reference=1),
    "lora": dict(method="dpo", lora={}),
    "experts": dict(method="sepo", model=lambda: experts()),
}


def experts(set_to=None, **more):
    """A mixture whose routers have a loss of their own; `set_to`: once it is made."""
    shape = dict(num_local_experts=4, num_experts_per_tok=2)
    asked = dict(output_router_logits=True, router_aux_loss_coef=0.1)
    model = tiny_model("mixtral", **{**shape, **asked, **more})
    if set_to is not None:
        model.router_aux_loss_coef = set_to
    return model


def make(path, *, pairs=PAIRS, eval_pairs=None, model=None, reference=None, lora=None, **args):
    """`reference` is a live one or its seed, `lora` what is told of adapters."""
    defaults = dict(
        output_dir=str(path), pairs_per_step=4, learning_rate=0.01, warmup_steps=0,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=1, disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    adapters = None
    if lora is not None:
        told = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapters = LoraConfig(**{**told, **lora})
    if reference is not None or lora is not None:  # else the pairs' own is read
        pairs = [replace(p, chosen_ref_logp=None, rejected_ref_logp=None) for p in pairs]
    if isinstance(reference, int):
        reference = tiny_model(seed=reference)
    return SePOTrainer(
        model or tiny_model(),
        SePOConfig(**{**defaults, **args}),
        pairs,
        eval_pairs,
        reference_model=reference,
        peft_config=adapters,
    )


def first_pair(**changes):
    return [replace(PAIRS[0], **changes), *PAIRS[1:]]


def nudged(values):
    values = values.copy()
    values[-1] = np.nextafter(values[-1], np.float32(np.inf))
    return values


def base_nudged_at(name):
    model = tiny_model()
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(torch.inf))
    return model


def made(arguments):
    return {
        k: v() if k in ("model", "reference") and callable(v) else v for k, v in arguments.items()
    }


def changed(kind, change):
    return made(KINDS[kind] | change)
