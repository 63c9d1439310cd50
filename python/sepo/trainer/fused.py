"""Bring a model to its device, in as few kernels as it can have there, ready for packed batches."""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, parse_flag_from_env
from torch import nn

from sepo.errors import InputError
from sepo.model.base import base_of
from sepo.model.prepare import has_storage, prepare_model, probed, rounding
from sepo.trainer.config import SePOConfig
from sepo.trainer.layers import choose_fused, compile_layers, runs_triton, use_liger, why_not_liger


def settle_layers(
    args: SePOConfig,
    model: nn.Module,  # of transformers, or a PeftModel around one
) -> str:  # what it came to and why, for a log
    """Put what it comes to in the place of --fused_layers auto: a checkpoint then knows it.

    Raises InputError as `choose_fused` does.
    """
    args.fused_layers, why = choose_fused(
        args.fused_layers,
        base_of(model),
        args.device,
        selective=args.selective_checkpointing,
        compiled=args.torch_compile,
    )
    return f"{args.fused_layers} ({why})"


def place_and_prepare(
    model: nn.Module,  # of transformers, or a PeftModel around one
    args: SePOConfig,  # its layers settled
    *,
    policy: bool = True,  # False: a reference, which computes as the policy does where it can
) -> None:
    """Move a model to where it will run, fuse its layers there, and prepare it: once.

    Early, so that a model that is not served costs nothing more. What FSDP and ZeRO shard is moved
    when training starts: it is prepared where it is. Liger's kernels come before the comparison of
    `prepare_model`, which then compares them too; compiled parts come after it (`compile_parts`),
    or it would compile what training never runs.
    """
    if not policy or not _moves_later(model, args):
        model.to(args.device)
    base = base_of(model)
    if args.fused_layers == "liger" and (policy or why_not_liger(base, base.device) is None):
        save_gemms = args.selective_checkpointing
        fuse_layers(model, args.liger_kernel_config, save_gemms=save_gemms)
    prepare_model(model, attn_impl=args.attn_impl)


def _moves_later(policy: nn.Module, args: SePOConfig) -> bool:
    """Whether Trainer leaves a model where it is until training starts, or for good."""
    return (
        args.place_model_on_device is False
        or parse_flag_from_env("ACCELERATE_USE_FSDP", bool(args.fsdp))
        or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED", bool(args.deepspeed))
        or args.fp16_full_eval
        or args.bf16_full_eval
        or getattr(policy, "hf_device_map", None) is not None
        or getattr(policy, "is_quantized", False)
        or getattr(policy, "is_distributed_loading_by_transformers", False)
    )


def compile_parts(model: nn.Module, args: SePOConfig, accelerator: Accelerator) -> None:
    """Compile a prepared model's layers, if the run is one of compiled layers."""
    plugin = accelerator.state.dynamo_plugin
    if args.fused_layers == "compile" and plugin.backend == DynamoBackend.NO:
        plugin = TorchDynamoPlugin(backend="inductor")
    if plugin.backend != DynamoBackend.NO:
        compile_layers(model, plugin)


def fuse_layers(
    model: nn.Module,  # prepared; or a PeftModel around one; where it will run
    kernels: dict[str, bool] | None = None,  # see use_liger
    *,
    save_gemms: bool = False,
) -> None:
    """Let Liger's kernels compute the model's layers, and hold them against what they replace.

    `prepare_model` compares anew what is packed with what is not. Raises InputError, with the layers
    as they were, for kernels that compute something else.
    """
    base = base_of(model)
    # FSDP and ZeRO move a model when training starts, and shard it: it was compared as it was
    here = runs_triton(base.device)
    expected = probed(model) if here and has_storage(base) else None
    undo = use_liger(base, kernels, save_gemms=save_gemms)
    if expected is not None:
        error = (probed(model) - expected).abs().max().item()
        if not error <= (allowed := rounding(base, expected)):
            undo()
            raise InputError(
                f"--fused_layers: expected Liger's kernels to give {type(base).__name__}'s "
                f"log-probabilities within {allowed:.1g} nats, got {error:.2g} off: choose compile "
                "or none"
            )
    base.fused_layers = "liger"
    if here:
        base.packed_checked = frozenset()
