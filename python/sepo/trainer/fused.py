"""What a run's layers and micro-batches come to on its device: fewer kernels, and more tokens each."""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers import PreTrainedModel

from sepo.errors import InputError
from sepo.model.budget import default_budget
from sepo.model.forward import base_of
from sepo.model.prepare import prepare_model, probe_logprob, rounding
from sepo.trainer.config import SePOConfig
from sepo.trainer.layers import choose_fused, compile_layers, runs_triton, use_liger, why_not_liger


def settle(
    args: SePOConfig,
    model: PreTrainedModel,  # or a PeftModel around one
    reference: object = None,  # a live one counts
) -> dict[str, str]:  # what -> what it came to and why, for a log
    """Put what they come to in the place of --fused_layers auto and of no --max_tokens_per_batch.

    A checkpoint then knows both. Raises InputError as `choose_fused` does.
    """
    base = base_of(model)
    args.fused_layers, why = choose_fused(
        args.fused_layers,
        base,
        args.device,
        recompute=args.recompute,
        compiled=args.torch_compile,
    )
    found = {"layers": f"{args.fused_layers} ({why})"}
    if args.max_tokens_per_batch is None:
        live = reference if isinstance(reference, nn.Module) else None
        args.max_tokens_per_batch, found["micro-batches"] = default_budget(base, args, live)
    return found


def fuse_and_prepare(
    model: PreTrainedModel,  # or a PeftModel around one
    args: SePOConfig,  # settled
    accelerator: Accelerator,
    *,
    policy: bool = True,  # False: a reference, which computes as the policy does where it can
) -> None:
    """Fuse a model's layers where it runs now, and prepare it there.

    Liger's kernels come before the comparison of `prepare_model`. Compiled parts come after it:
    comparing would compile what training never runs.
    """
    how, plugin, base = args.fused_layers, accelerator.state.dynamo_plugin, base_of(model)
    if how == "liger" and (policy or why_not_liger(base, base.device) is None):
        keep_products = args.recompute == "cheap"
        fuse_layers(model, args.liger_kernel_config, keep_products=keep_products)
    prepare_model(model)
    if how == "compile" and plugin.backend == DynamoBackend.NO:
        plugin = TorchDynamoPlugin(backend="inductor")
    if plugin.backend != DynamoBackend.NO:
        compile_layers(model, plugin)


def fuse_layers(
    model: PreTrainedModel,  # prepared; or a PeftModel around one; where it will run
    kernels: dict[str, bool] | None = None,  # see use_liger
    *,
    keep_products: bool = False,
) -> None:
    """Let Liger's kernels compute the model's layers, and hold them against what they replace.

    `prepare_model` compares anew what is packed with what is not. Raises InputError, with the layers
    as they were, for kernels that compute something else.
    """
    base = base_of(model)
    # FSDP and ZeRO move a model when training starts, and shard it: it was compared as it was
    here = runs_triton(base.device)
    expected = probe_logprob(model) if here else None
    undo = use_liger(base, kernels, keep_products=keep_products)
    if expected is not None:
        error = (probe_logprob(model) - expected).abs().max().item()
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
