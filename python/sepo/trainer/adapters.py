"""LoRA and QLoRA through peft and bitsandbytes, which need not be installed for anything else."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from sepo.errors import InputError
from sepo.model.base import adapted, base_of, has_adapters
from sepo.trainer.config import SePOConfig


def lora_config(args: SePOConfig):
    """peft's LoraConfig as the flags describe it; None without --use_peft."""
    if not args.use_peft:
        return None
    _expect("peft", "--use_peft")
    from peft import LoraConfig

    modules = args.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        modules_to_save=args.lora_modules_to_save,
    )


def add_adapters(
    model: torch.nn.Module,  # of transformers
    peft_config,  # peft.PeftConfig
) -> torch.nn.Module:  # peft.PeftModel
    """The model, frozen, with new adapters to train: float32 ones, whatever the model's dtype.

    Raises InputError, in peft's words, for modules that the model does not have.
    """
    _expect("peft", "peft_config")
    from peft import get_peft_model

    try:
        return get_peft_model(base_of(model), peft_config)
    except ValueError as error:
        raise InputError(f"--lora_target_modules: {error}") from error


def check_adapters(
    model: torch.nn.Module,
    peft_config,  # peft.PeftConfig, None: no new ones
) -> None:
    """Raise InputError for a policy whose adapters would be lost, or trained upon unseen."""
    stacked = has_adapters(model) or getattr(model, "_hf_peft_config_loaded", False)
    if stacked and peft_config is not None:
        raise InputError(
            "peft_config: expected a model without adapters, got one that has some; "
            "merge_and_unload() them first, or load its folder with sepo.model.load_model, which does"
        )
    if stacked and not has_adapters(model) and not _trains_adapters(model):
        raise InputError(
            "expected a plain model, or adapters to train, got a model into which transformers put a "
            "frozen adapter; load its folder with sepo.model.load_model, which merges it"
        )


def _trains_adapters(model: torch.nn.Module) -> bool:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    configs = adapted(model).peft_config.values()
    marks = tuple(PEFT_TYPE_TO_PREFIX_MAPPING[c.peft_type] for c in configs)
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    return any(mark in name for name in trained for mark in marks)


def quantization_config(args: SePOConfig) -> BitsAndBytesConfig | None:
    """How transformers shall load the frozen weights under QLoRA; None: as they are."""
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    _expect("bitsandbytes", "--load_in_4bit" if args.load_in_4bit else "--load_in_8bit")
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else getattr(torch, args.dtype),
    )


def _expect(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"{what} needs {package}, which is not installed: pip install {package}")
