"""Change the layers of a model before it is trained: recompute, fuse, compile."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.utils._triton import has_triton
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sepo.errors import InputError, one_line
from sepo.trainer.config import FusedLayers
from sepo_kernels.devices import INTERPRET

OPS_TO_SAVE = {  # by namespace: GEMMs, and every attention that a packed batch may take
    "aten": (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "sepo": ("native_packed_attention",),
    "torch_attn": ("_varlen_attn",),
    "flash_attn": ("_flash_attn_varlen_forward",),
}
# of Liger's, by the name it has for them: what it computes an activation of that name as
ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to zero, attention's included, adapters' not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def checkpoint_selectively(model: PreTrainedModel) -> None:
    """Save the outputs of GEMMs and attention; recompute everything between them in backward.

    Norms, activations, rotations and casts take most of a layer's memory and little of its time.
    The gradient is the same, bit for bit.
    """
    saved = [
        operator.default
        for namespace, names in OPS_TO_SAVE.items()
        for name in names
        if (operator := getattr(getattr(torch.ops, namespace), name, None)) is not None
    ]
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(  # its name before transformers 5.20
        {
            "use_reentrant": False,
            "context_fn": partial(create_selective_checkpoint_contexts, saved),
        }
    )


def choose_fused(
    wish: FusedLayers,
    model: PreTrainedModel,
    device: torch.device,  # where it will run
    *,
    selective: bool = False,  # --selective_checkpointing
    compiled: bool = False,  # --torch_compile: the compiler is chosen already
) -> tuple[FusedLayers, str]:
    """Decide what `wish` comes to, and why: (liger, compile or none; in words).

    Raises InputError for a wish for Liger's kernels that this model or device can't have.
    """
    if getattr(model, "fused_layers", None) == "liger":
        return "liger", "the model came with them"
    if compiled:
        return "compile", "--torch_compile"
    reason = why_not_liger(model, device) if wish in ("auto", "liger") else None
    if wish == "liger" and reason:
        raise InputError(
            "--fused_layers liger: expected a model that Liger has kernels for, on a GPU, got: "
            f"{reason}; see --fused_layers auto"
        )
    if wish != "auto":
        return wish, "as asked"
    if device.type != "cuda":
        return "none", f"auto, on a device of kind {device.type}"
    if reason is None:
        return "liger", "auto"
    if selective:
        hides = "a compiled part hides its GEMMs from --selective_checkpointing"
        return "none", f"{reason}, and {hides}"
    if not has_triton():
        return "none", f"{reason}, and the compiler has no triton here"
    return "compile", reason


def why_not_liger(model: PreTrainedModel, device: torch.device) -> str | None:
    """Say what keeps Liger's kernels from computing this model's layers there, if anything does."""
    if not runs_triton(device):
        return f"its kernels need a GPU, got a {device.type.upper()}"
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in 32 or 16 bits, got {model.dtype}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        known = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # of an installation that does not fit the rest
        return f"liger-kernel: {one_line(error)}"
    kind = model.config.model_type
    if kind not in known:
        return f"it has no kernels for the architecture {kind}"
    if not type(model).__module__.startswith("transformers."):
        return f"it knows transformers' own classes, got {type(model).__name__} of another file"
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    for name in inspect.signature(known[kind]).parameters:
        if found not in (activations := ACTIVATIONS.get(name, (found,))):
            return f"it computes {activations[0]}, got a model with {found}"
    return None


def runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or INTERPRET


def use_liger(
    model: PreTrainedModel,  # one that why_not_liger finds nothing against
    kernels: dict[str, bool] | None = None,  # by Liger's names for them; None: all for layers
    *,
    save_gemms: bool = False,  # their outputs are read in backward: never write into one
) -> Callable[[], None]:  # takes it all back
    """Let Liger's kernels compute norms, gated activations and rotations of this model, in place.

    Names in the state dict stay. Liger would change transformers' files as well, for every model to
    come: that is taken back, and this model's attention finds Liger's rotation all the same. Its
    losses stay off, and its experts, which are products. Raises InputError for an unknown kernel.
    """
    apply = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    known = inspect.signature(apply).parameters.keys() - {"model", "kwargs"}
    off = {name: False for name in known if "cross_entropy" in name}
    kernels = {name: on for name, on in (kernels or {}).items() if on or name not in off}
    if unknown := sorted(kernels.keys() - (known := known - off.keys())):
        raise InputError(
            f"--liger_kernel_config {unknown[0]}: expected {' | '.join(sorted(known))}, Liger's "
            f"kernels for {model.config.model_type}"
        )
    if any("Experts" in type(module).__name__ for module in model.modules()):
        kernels = {"swiglu": False} | kernels
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    theirs = {file: dict(vars(file)) for file in files if file.__name__.startswith("transformers.")}
    ours = {module: dict(vars(module)) for module in model.modules()}

    def undo() -> None:
        for module, attributes in ours.items():
            vars(module).clear()
            vars(module).update(attributes)

    rotations: dict[str, dict[str, Callable]] = {}  # file -> what Liger has kernels for
    try:
        _liger()._apply_liger_kernel_to_instance(model, **kernels | off)
    except Exception:
        undo()
        raise
    finally:
        for file, names in theirs.items():
            functions = {name: f for name, f in names.items() if isinstance(f, FunctionType)}
            rotations[file.__name__] = {
                name: _without_writing(new) if save_gemms else new
                for name, old in functions.items()
                if (new := vars(file)[name]) is not old
            }
            vars(file).update(names)
    for module in model.modules():
        rotated = rotations.get(type(module).__module__, {})
        forward: Any = type(module).forward  # a function, of which torch's types say Callable
        code = forward.__code__
        own: Any = getattr(
            vars(module).get("forward"), "__func__", forward
        )  # ours, of an earlier call
        if own.__code__ is code and rotated.keys() & {*code.co_names}:
            module.forward = MethodType(_which_calls(forward, rotated), module)
    return undo


def fused_names(model: nn.Module) -> list[str]:
    """Classes of the modules that compute by a forward of their own."""
    return sorted(
        {type(m).__name__ for m in model.modules() if m is not model and "forward" in vars(m)}
    )


def _liger():
    from liger_kernel.transformers import monkey_patch  # slow to import, and need not be here

    return monkey_patch


def _which_calls(forward: FunctionType, functions: dict[str, Callable]) -> FunctionType:
    """The same code, which finds `functions` where it looks for names of its file."""
    copy = FunctionType(
        forward.__code__,
        forward.__globals__ | functions,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _without_writing(rotate: Callable) -> Callable:
    """Liger rotates in place, and tells nobody: what is saved for backward would be rotated twice."""

    def rotated(q, k, *args, **kwargs):
        return rotate(q.clone(), k.clone(), *args, **kwargs)

    return rotated


def compile_layers(model: nn.Module, plugin: TorchDynamoPlugin) -> None:
    """Compile the parts of every decoder layer in place: names in the state dict stay as they are.

    Parts, because activation checkpointing wraps a layer and the compiler does not look through
    it: compiled parts are recomputed as they ran first. All layers share the code of one, and
    sizes are dynamic from the start, or the second batch would recompile everything.
    """
    # every part is called by the same code, nn.Module's: kinds of parts, times training, evaluating
    # and references, share its limit, beyond which they would run as they are, and nobody be told
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    kwargs = plugin.to_kwargs() | {"dynamic": True, "fullgraph": False}
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and kwargs.get("backend", "inductor") == "inductor":  # it alone compiles C++
        _name_vectors()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                if next(part.parameters(), None) is not None:  # a dropout is not worth a graph
                    part.compile(**kwargs)


def _name_vectors() -> None:
    """Make the width of the vectors a part of what inductor looks up in its cache.

    It reads ATEN_CPU_CAPABILITY when it writes a kernel, and its cache knows nothing of that: told of
    another one, it takes a kernel for wider vectors, which writes beyond its buffers.
    """
    from torch._inductor import config, cpu_vec_isa  # slow to import, and few compile

    if config.cpp.simdlen is None:
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width()
