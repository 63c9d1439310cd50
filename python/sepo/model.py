"""A transformers decoder on packed batches: its hidden states, its head, its log-probabilities."""

from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sepo import attention
from sepo.data import all_positions, pack, truncate
from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.ops import selected_logprob


def token_logprob(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    budget: int | None = None,  # bytes for logits or probabilities, see selected_logprob
    impl: str = "auto",
) -> Tensor:  # (M,) float32, natural log-probability of batch.targets at batch.rows
    """Log-probability of every selected token; differentiable unless under no_grad.

    Call it inside the wrapped module's forward (`prepare_model` arranges that), or the hooks of DDP
    and FSDP2 do not fire.
    """
    return _logprob(model, batch, hidden_states(model, batch), budget=budget, impl=impl)


def _logprob(
    model: PreTrainedModel,
    batch: PackedBatch,
    hidden: Tensor,  # (N, D)
    *,
    budget: int | None = None,
    impl: str = "auto",
) -> Tensor:  # (M,) float32
    weight, bias, scale, softcap = head(model)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return selected_logprob(
        hidden,
        weight,
        batch.rows,
        batch.targets,
        bias=bias,
        scale=scale,
        softcap=softcap,
        budget=budget,
        impl=impl,
    )


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:  # (N, D)
    """The trunk's output after the final norm, for every row of the packed buffer."""
    return _trunk(model, batch, attention.Layout(batch, attn_impl(model)))


def attn_impl(model: PreTrainedModel) -> str:
    """The attention that prepare_model was asked for."""
    return getattr(_base(model), "packed_attn_impl", "auto")


def explain_attention(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> str:
    """One line for a log: which attention a training step takes on the model's device, and why.

    dtype is that of autocast, if the step runs under it.
    """
    base = _base(model)
    return attention.explain(attn_impl(base), _terms(base, dtype or base.dtype))


class Head(NamedTuple):
    """logits = softcap * tanh((hidden @ weight.T * scale + bias) / softcap)"""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def head(model: PreTrainedModel) -> Head:
    """What the model does after its trunk. Raises InputError for a head that isn't one matrix."""
    model = _base(model)
    module = model.get_output_embeddings()
    if reason := _why_not_head(model, module):
        raise InputError(f"{type(model).__name__}: expected an nn.Linear head, {reason}")
    config = model.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    factor = getattr(config, "logit_scale", None)  # Cohere multiplies
    return Head(
        weight=_full(module.weight),
        bias=None if module.bias is None else _full(module.bias),
        scale=(factor or 1.0) / (divisor or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def prepare_model(
    model: PreTrainedModel,  # or a PeftModel around one, before or after it was prepared
    *,
    attn_impl: str | None = None,  # a name of attention.IMPLS; None: what it was, else auto
) -> PreTrainedModel:
    """Make `model(batch=PackedBatch)` return token_logprob, and refuse a model that it can't serve.

    With `compute=f` the call returns f(model, batch) instead, for a loss that reads more than the
    log-probabilities. It goes through the module's own forward, so wrapping it in DDP or FSDP2
    afterwards is enough. Any other call is the model's own, which then needs another attention.
    The attention is chosen where it runs: prepare again after moving the model to another device,
    or what runs there was not compared with the model. Raises InputError naming the model and the
    reason.
    """
    base = _base(model)
    if attn_impl is not None:
        attention.check_name(attn_impl)
        base.packed_attn_impl = attn_impl
    if reason := _why_not(model):
        raise InputError(f"{type(base).__name__} is not supported: {reason}")
    head(base)
    probes = {} if _without_storage(base) else _runnable(base)
    for name, dtype in probes.items():
        probe = (base.device.type, base.dtype, name)
        checked = getattr(base, "packed_checked", frozenset())
        if probe not in checked:
            with torch.autocast(base.device.type, torch.bfloat16, enabled=dtype != base.dtype):
                _check_against_itself(base, name)
            base.packed_checked = checked | {probe}
    base.set_attn_implementation(attention.ATTENTION)
    base.forward = MethodType(_forward, base)
    return model


def _forward(
    self,
    *args,
    batch: PackedBatch | None = None,
    compute: Callable | None = None,  # (model, batch) -> tensors
    **kwargs,
):
    if batch is None:
        return type(self).forward(self, *args, **kwargs)
    return (compute or token_logprob)(self, batch)


def load_model(
    path: str,  # hub id or local directory
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_impl: str = "auto",  # or a name of attention.IMPLS
    quantization_config=None,  # transformers' BitsAndBytesConfig; then it chooses the device
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A prepared model in eval mode, from safetensors. Raises InputError if it can't be loaded."""
    attention.check_name(attn_impl)  # before minutes of reading
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            quantization_config=quantization_config,
            use_safetensors=True,  # nothing is unpickled
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"can't load a model from {path}: {_first_line(error)}") from error
    if quantization_config is None:
        model = model.to(device)
    return prepare_model(model.eval(), attn_impl=attn_impl)


def load_tokenizer(path: str, *, trust_remote_code: bool = False):
    """The tokenizer saved beside a model. Raises InputError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"can't load a tokenizer from {path}: {_first_line(error)}") from error


def _trunk(model: PreTrainedModel, batch: PackedBatch, layout: attention.Layout) -> Tensor:
    output = _base(model).get_decoder()(
        input_ids=batch.tokens[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,  # a 2-D mask of ones would let the pairs see each other
        use_cache=False,
        packed_layout=layout,
    )
    return output.last_hidden_state[0]  # (N, D)


def _base(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, whose adapters are in its layers; else itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _why_not(model: PreTrainedModel) -> str | None:
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return f"{adapter.peft_type.value} adapters put tokens or keys before every sequence"
    return attention.why_not(_base(model))


def _why_not_head(model: PreTrainedModel, module: nn.Module | None) -> str | None:
    name = type(module).__name__
    if _is_adapter(module):
        return f"got {name} of peft; an adapter on the head is not supported"
    tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if tied and _is_adapter(model.get_input_embeddings()):
        return (
            "got one tied to an embedding with an adapter; an adapter on the head is not supported"
        )
    if not isinstance(module, nn.Linear):
        return f"got {name}"
    if getattr(model, "tp_size", None) not in (None, 1):
        return f"got {name} split by tensor parallelism"
    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = (Tensor, nn.Parameter, DTensor)
    if type(module.weight) not in tensors or module.weight.dtype not in plain:
        kind = f"{type(module.weight).__name__} of {module.weight.dtype}"
        return f"got {name} with a quantised weight ({kind}); leave the head out of quantisation"
    return None


def _is_adapter(module: nn.Module | None) -> bool:
    # what peft puts in a module's place: base_layer in a tuner's layer, the others in its wrappers
    marks = ("base_layer", "original_module", "token_adapter")
    return any(hasattr(module, mark) for mark in marks)


def _without_storage(model: PreTrainedModel) -> bool:
    """On no device yet, or in shards: only collectives could run it."""
    return any(p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters())


def _runnable(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The attentions that the wish comes to on this device, each with a dtype that it runs in.

    A float32 model may be trained under autocast, where another is chosen. A model for a GPU's
    attention may still be on the CPU: then it is what "auto" takes there.
    """
    found, refusal, wish = {}, None, attn_impl(model)
    dtypes = [model.dtype] + [torch.bfloat16] * (model.dtype == torch.float32)
    for dtype in dtypes:
        terms = _terms(model, dtype)
        try:
            found.setdefault(attention.choose(wish, terms).name, dtype)
        except InputError as error:
            refusal = error
            if model.device.type == "cpu":
                found.setdefault(attention.choose("auto", terms).name, dtype)
    if not found:
        raise refusal
    return found


def _terms(model: PreTrainedModel, dtype: torch.dtype) -> attention.Terms:
    """What the layers of a training step will ask, as far as the model tells before it runs."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropouts = [0.0]
    for name, module in model.named_modules():
        if name.endswith("attn_dropout") and isinstance(module, nn.Dropout):  # GPT-2's place for it
            dropouts.append(module.p)
        if isinstance(own := getattr(module, "attention_dropout", None), float):
            dropouts.append(own)
    return attention.Terms(
        device=model.device,
        dtype=dtype,
        width=width,
        value_width=getattr(config, "v_head_dim", None) or width,
        gradient=True,
        dropout=max(dropouts) if model.training else 0.0,
        window=getattr(config, "sliding_window", None),
        softcap=getattr(config, "attn_logit_softcapping", None),
    )


@torch.no_grad()
def _check_against_itself(model: PreTrainedModel, impl: str) -> None:
    """Compare a small packed batch with the model's own forward on separate sequences.

    What `why_not` and `head` do not know by name (a new kind of layer, a transform of the logits)
    shows here, before anything is trained on it.
    """
    training, implementation = model.training, model.config._attn_implementation
    device, vocab_size = model.device, model.get_input_embeddings().num_embeddings
    model.eval()
    draw = lambda n, seed: np.random.default_rng(seed).integers(0, vocab_size, n).astype(np.int32)
    triples = [(draw(4, 0), draw(3, 1), draw(5, 2)), (draw(2, 3), draw(6, 4), draw(2, 5))]
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = pack([(p, whole(c), whole(r)) for p, c, r in triples]).to(device)
    layout = attention.Layout(batch, impl)
    expected = []
    try:
        model.set_attn_implementation("eager")  # the definition: sdpa ignores a soft cap
        for prompt, *responses in triples:
            for response in responses:
                ids = torch.from_numpy(np.concatenate([prompt, response])).long().to(device)
                logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
                logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                expected.append(logp.gather(-1, ids[len(prompt) :, None])[:, 0])
        model.set_attn_implementation(attention.ATTENTION)
        found = _logprob(model, batch, _trunk(model, batch, layout))
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    if attention.windows_missed(model.config, layout):
        raise InputError(
            f"{type(model).__name__} is not supported: its layers do not tell the attention their "
            "sliding windows"
        )
    expected = torch.cat(expected)
    error = (found - expected).abs().max().item()
    # rounding of a random token's log-probability (about ln V) through the whole trunk; a head that
    # is very sure of itself rounds larger numbers
    # (models round some steps to float32 even in float64)
    # (a quantised model computes in 16 bits or fewer, whatever its other weights are)
    coarse = model.dtype.itemsize == 2 or getattr(model, "is_quantized", False)
    coarse |= torch.is_autocast_enabled(device.type)
    size = max(1, expected.abs().max().item() / 10)
    allowed = 0.5 if coarse else 1e3 * torch.finfo(torch.float32).eps * size
    if not error <= allowed:
        raise InputError(
            f"{type(model).__name__} is not supported: packed log-probabilities differ from its own "
            f"by {error:.2g} nats"
        )


def _full(parameter: Tensor) -> Tensor:
    """All of a head that FSDP2 shards on its own; a head in the root's group is whole already."""
    if isinstance(parameter, DTensor):
        # every rank used all of it for its own pairs: gradients average, like FSDP2's own
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
