"""A transformers decoder on packed batches: its hidden states, its head, its log-probabilities."""

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
    hidden = hidden_states(model, batch)
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
    output = model.get_decoder()(
        input_ids=batch.tokens[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,  # a 2-D mask of ones would let the pairs see each other
        use_cache=False,
        packed_batch=batch,
    )
    return output.last_hidden_state[0]


class Head(NamedTuple):
    """logits = softcap * tanh((hidden @ weight.T * scale + bias) / softcap)"""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def head(model: PreTrainedModel) -> Head:
    """What the model does after its trunk. Raises InputError for a head that isn't one matrix."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or getattr(module, "active_adapters", None):
        raise InputError(
            f"{type(model).__name__}: expected an nn.Linear head, got {type(module).__name__}; "
            "an adapter on the head is not supported"
        )
    config = model.config.get_text_config(decoder=True)
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    factor = getattr(config, "logit_scale", None)  # Cohere multiplies
    return Head(
        weight=_full(module.weight),
        bias=None if module.bias is None else _full(module.bias),
        scale=(factor or 1.0) / (divisor or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model(batch=PackedBatch)` return token_logprob, and refuse a model that it can't serve.

    The call goes through the module's own forward, so wrapping it in DDP or FSDP2 afterwards is
    enough. Any other call is the model's own, which then needs another attention implementation.
    Raises InputError naming the model and the reason.
    """
    if getattr(model.forward, "__func__", None) is not _forward:  # else it was checked before
        if reason := attention.why_not(model):
            raise InputError(f"{type(model).__name__} is not supported: {reason}")
        head(model)
        _check_against_itself(model)
    model.set_attn_implementation(attention.ATTENTION)
    model.forward = MethodType(_forward, model)
    return model


def _forward(self, *args, batch: PackedBatch | None = None, budget: int | None = None, **kwargs):
    if batch is None:
        return type(self).forward(self, *args, **kwargs)
    return token_logprob(self, batch, budget=budget)


def load_model(
    path: str,  # hub id or local directory
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A prepared model in eval mode, from safetensors. Raises InputError if it can't be loaded."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,  # nothing is unpickled
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"can't load a model from {path}: {_first_line(error)}") from error
    return prepare_model(model.to(device).eval())


def load_tokenizer(path: str, *, trust_remote_code: bool = False):
    """The tokenizer saved beside a model. Raises InputError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"can't load a tokenizer from {path}: {_first_line(error)}") from error


@torch.no_grad()
def _check_against_itself(model: PreTrainedModel) -> None:
    """Compare a small packed batch with the model's own forward on separate sequences.

    What `why_not` and `head` do not know by name (a new kind of layer, a transform of the logits)
    shows here, before anything is trained on it.
    """
    training, implementation = model.training, model.config._attn_implementation
    device, vocab_size = model.device, model.get_input_embeddings().num_embeddings
    if device.type == "meta":
        return
    model.eval()
    draw = lambda n, seed: np.random.default_rng(seed).integers(0, vocab_size, n).astype(np.int32)
    triples = [(draw(4, 0), draw(3, 1), draw(5, 2)), (draw(2, 3), draw(6, 4), draw(2, 5))]
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = pack([(p, whole(c), whole(r)) for p, c, r in triples]).to(device)
    expected = []
    model.set_attn_implementation(
        "sdpa" if implementation == attention.ATTENTION else implementation
    )
    for prompt, *responses in triples:
        for response in responses:
            ids = torch.from_numpy(np.concatenate([prompt, response])).long().to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            expected.append(logp.gather(-1, ids[len(prompt) :, None])[:, 0])
    model.set_attn_implementation(attention.ATTENTION)
    found = token_logprob(model, batch)
    model.set_attn_implementation(implementation)
    model.train(training)
    error = (found - torch.cat(expected)).abs().max().item()
    # rounding of a random token's log-probability (about ln V) through the whole trunk
    allowed = 1e3 * torch.finfo(model.dtype).eps if model.dtype.itemsize > 2 else 0.5
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
