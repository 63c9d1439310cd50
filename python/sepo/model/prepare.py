"""Prepare a model for packed batches: refuse what is not served, compare it with itself."""

from dataclasses import replace
from types import MethodType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sepo import attention
from sepo.data import all_positions, pack, truncate
from sepo.data.types import PackedBatch
from sepo.errors import InputError
from sepo.model.base import base_of
from sepo.model.forward import (
    attn_impl,
    head,
    token_logprob,
    use_packed_attention,
    vocabulary,
)
from sepo.model.reads import forward_of

M = TypeVar("M", bound=nn.Module)


def explain_attention(model: nn.Module, *, dtype: torch.dtype | None = None) -> str:
    """One line for a log: which attention a training step takes on the model's device, and why.

    dtype is that of autocast, if the step runs under it.
    """
    base = base_of(model)
    return attention.explain(attn_impl(base), _terms(base, dtype or base.dtype))


def attention_needs(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,  # of autocast, if the model runs under it
) -> list[tuple[str, attention.Terms]]:
    """List what its layers will ask of a batch's attention, for `attention.with_arrays`."""
    base = base_of(model)
    terms = _terms(base, dtype or base.dtype)
    windows = dict.fromkeys(attention.windows(base.config))
    return [(attn_impl(base), replace(terms, window=window)) for window in windows]


def prepare_model(
    model: M,  # of transformers, or a PeftModel around one, before or after it was prepared
    *,
    attn_impl: str | None = None,  # a name of attention.IMPLS; None: what it was, else auto
) -> M:
    """Make `model(batch=PackedBatch)` answer, and refuse a model that it can't serve.

    The answer is token_logprob, or with `reads=` (`sepo.model.reads`) the TokenValues that a loss
    wants. It goes through the module's own forward, so wrapping it in DDP or FSDP2 afterwards is
    enough. Any other call is the model's own, with the attention that it had; under activation
    checkpointing no such call belongs between a batch's forward and its backward, which runs the
    layers once more.
    Prepare a model where it will run: there its attention is chosen and compared with the model
    itself. After a move to another device prepare it again; what was compared is not again.
    Raises InputError naming the model and the reason.
    """
    base = base_of(model)
    if attn_impl is not None:
        attention.check_name(attn_impl)
        base.packed_attn_impl = attn_impl
    if reason := _why_not(model):
        raise InputError(f"{type(base).__name__} is not supported: {reason}")
    head(base)
    compared: frozenset = getattr(base, "packed_checked", frozenset())
    for name, dtype in (_runnable(base) if has_storage(base) else {}).items():
        probe = (base.device.type, base.dtype, name)
        if probe not in compared:
            with torch.autocast(base.device.type, torch.bfloat16, enabled=dtype != base.dtype):
                _check_against_itself(base, name)
            compared |= {probe}
    base.packed_checked = compared
    use_packed_attention(base)
    base.forward = MethodType(forward_of(type(base)), base)
    return model


def prepare_if_new(model: M) -> M:
    """Prepare a model that nobody prepared, as `load_model` gives it."""
    return model if hasattr(base_of(model), "packed_checked") else prepare_model(model)


def _why_not(model: nn.Module) -> str | None:
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        return f"{adapter.peft_type.value} adapters put tokens or keys before every sequence"
    return attention.why_not(base_of(model))


def has_storage(model: nn.Module) -> bool:
    """Whether it can run by itself: on no device yet, or in shards, only collectives could."""
    return not any(
        p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters()
    )


def _runnable(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The attentions that the wish comes to on this device, each with a dtype that it runs in.

    A float32 model may be trained under autocast, where another is chosen. A model for a GPU's
    attention may still be on the CPU: then it is what "auto" takes there.
    """
    runnable: dict[str, torch.dtype] = {}
    refusal: InputError | None = None
    wish = attn_impl(model)
    dtypes = [model.dtype] + [torch.bfloat16] * (model.dtype == torch.float32)
    for dtype in dtypes:
        terms = _terms(model, dtype)
        try:
            runnable.setdefault(attention.choose(wish, terms).name, dtype)
        except InputError as error:
            refusal = error
            if model.device.type == "cpu":
                runnable.setdefault(attention.choose("auto", terms).name, dtype)
    if not runnable and refusal is not None:
        raise refusal
    return runnable


def _terms(model: PreTrainedModel, dtype: torch.dtype) -> attention.Terms:
    """Foresee what the layers of a training step ask, as far as the model tells before it runs."""
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
    parts = []
    triples, batch = _probe(model)
    layout = attention.PackedLayout(batch, impl)
    model.eval()
    try:
        model.set_attn_implementation("eager")  # the definition: sdpa ignores a soft cap
        for prompt, *responses in triples:
            for response in responses:
                ids = torch.from_numpy(np.concatenate([prompt, response])).long().to(model.device)
                logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
                logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                parts.append(logp.gather(-1, ids[len(prompt) :, None])[:, 0])
        model.set_attn_implementation(attention.ATTENTION)
        packed = token_logprob(model, batch, layout=layout)
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    if attention.windows_missed(model.config, layout):
        raise InputError(
            f"{type(model).__name__} is not supported: its layers do not tell the attention their "
            "sliding windows"
        )
    own = torch.cat(parts)
    error = (packed - own).abs().max().item()
    allowed = rounding(model, own)
    if not error <= allowed:
        raise InputError(
            f"{type(model).__name__} is not supported: packed log-probabilities differ from its own "
            f"by {error:.2g} nats"
        )


def probe_logprob(model: nn.Module) -> Tensor | None:  # (M,) float32
    """Of a few random tokens, where the model is now; None while it is on no device, or in shards."""
    return probed(model) if has_storage(base_of(model)) else None


@torch.no_grad()
def probed(model: nn.Module) -> Tensor:  # (M,) float32
    """The same of a model that `has_storage`."""
    base = base_of(model)
    (name, dtype), *_ = _runnable(base).items()
    _, batch = _probe(base)
    training = model.training
    model.eval()
    with torch.autocast(base.device.type, torch.bfloat16, enabled=dtype != base.dtype):
        logp = token_logprob(model, batch, layout=attention.PackedLayout(batch, name))
    model.train(training)
    return logp


def rounding(model: nn.Module, logp: Tensor) -> float:
    """Nats by which the same computation in another order may differ."""
    # rounding of a random token's log-probability (about ln V) through the whole trunk; a head that
    # is very sure of itself rounds larger numbers
    # (models round some steps to float32 even in float64)
    # (a quantised model computes in 16 bits or fewer, whatever its other weights are)
    base = base_of(model)
    coarse = base.dtype.itemsize == 2 or getattr(base, "is_quantized", False)
    coarse |= torch.is_autocast_enabled(base.device.type)
    size = max(1, logp.abs().max().item() / 10)
    return 0.5 if coarse else 1e3 * torch.finfo(torch.float32).eps * size


def _probe(model: PreTrainedModel) -> tuple[list[tuple[np.ndarray, ...]], PackedBatch]:
    """Two small pairs of random tokens, as (prompt, chosen, rejected) and packed."""
    size = vocabulary(model)

    def draw(n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, size, n).astype(np.int32)

    triples = [(draw(4, 0), draw(3, 1), draw(5, 2)), (draw(2, 3), draw(6, 4), draw(2, 5))]
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = pack([(p, whole(c), whole(r)) for p, c, r in triples]).to(model.device)
    return [*triples], batch
