"""How many tokens one micro-batch may have: the default of --max_tokens_per_batch."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

OFF_A_GPU = 8192  # tokens, where the memory is not the model's alone
MOST = 65536  # more gains nothing: products of 32 k rows fill a GPU, and a step wants several
LEAST = 2048  # a pair of 1024 tokens a side
USABLE = 0.93  # of a GPU's memory; the rest: CUDA's context, workspaces, holes, logits kept
STEP = 1024

Saved = Literal["all", "gemms", "inputs", "nothing"]  # for backward, by a layer


@dataclass(frozen=True)
class Sizes:
    """A decoder, as far as its activations go."""

    hidden: int
    queries: int  # heads times their width
    keys: int  # the same of keys; values have as much
    inner: int  # of a feed-forward block; of experts, those that a token meets
    layers: int
    vocabulary: int
    norms: int = 2  # a layer, over the hidden width
    head_norms: bool = False  # over each head of queries and keys


def default_budget(
    model: PreTrainedModel,
    args: Any,  # a SePOConfig, its fused_layers settled
    reference: nn.Module | None = None,  # a live one
) -> tuple[int, str]:  # tokens, and why so many
    """--max_tokens_per_batch where it is not given: by the memory of a GPU, of all of it.

    The same number whenever the same run starts on the same device, whatever else is there.
    """
    memory = device_memory(args.device)
    if memory is None:
        return OFF_A_GPU, f"at most {OFF_A_GPU} tokens, the default on a {args.device.type}"
    numel = lambda p: getattr(p, "ds_numel", None) or p.numel()  # ZeRO-3 leaves them empty
    parameters = [*model.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    weight_bytes = max((p.itemsize for p in trained), default=4)
    sixteen = args.bf16 or args.fp16 or model.dtype.itemsize == 2
    sizes, head = sizes_of(model), model.get_output_embeddings()
    held = held_bytes(
        sum(numel(p) * p.itemsize for p in parameters),
        trained=sum(map(numel, trained)),
        weight_bytes=weight_bytes,
        state_bytes=state_bytes(str(getattr(args.optim, "value", args.optim)), weight_bytes),
        head=sizes.vocabulary * sizes.hidden if head.weight.requires_grad else 0,
        cast=sixteen and weight_bytes == 4,
        ranks=args.world_size,
        sharded=bool(args.fsdp or args.deepspeed) and args.world_size > 1,
        reference=sum(p.numel() * p.itemsize for p in reference.parameters()) if reference else 0,
    )
    whole = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    a_token = token_bytes(
        sizes,
        saved="inputs" if whole else "gemms" if args.selective_checkpointing else "all",
        itemsize=2 if sixteen else 4,
        fused=args.fused_layers != "none",
    )
    tokens = token_budget(memory, held, a_token, least=max(LEAST, 2 * (args.max_length or 0)))
    return tokens, in_words(tokens, memory, held, a_token)


def scoring_budget(
    models: dict[str, PreTrainedModel],  # by role; what two of them share is held once
    itemsize: int,  # of the arithmetic
    beside: float = 0,  # bytes of the weights' halves, over those of the weights
) -> tuple[int, str]:  # tokens, and why so many
    """The same for passes without gradients, of which every device that has a model holds one."""
    budgets = []
    for model in models.values():
        device = model.device
        if (memory := device_memory(device)) is None:
            budgets.append(
                (OFF_A_GPU, f"at most {OFF_A_GPU} tokens, the default on a {device.type}")
            )
            continue
        there = {p for m in models.values() if m.device == device for p in m.parameters()}
        held = sum(p.numel() * p.itemsize for p in there)
        held = round(held * (1 + beside))
        a_token = token_bytes(sizes_of(model), saved="nothing", itemsize=itemsize, fused=False)
        tokens = token_budget(memory, held, a_token)
        budgets.append((tokens, in_words(tokens, memory, held, a_token)))
    return min(budgets)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that has a memory of its own, taken or not."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def sizes_of(model: PreTrainedModel) -> Sizes:
    """As its configuration and the names of its modules tell."""
    config = model.config.get_text_config(decoder=True)
    first = lambda *names: next((v for n in names if (v := getattr(config, n, None))), None)
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = first("head_dim") or hidden // heads
    experts = first("num_experts_per_tok", "num_experts_per_token", "moe_topk")
    inner = first("moe_intermediate_size") if experts else None
    inner = (inner or first("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden) * (
        experts or 1
    )
    layers = config.num_hidden_layers
    norms = [name for name, _ in model.named_modules() if "norm" in name.rpartition(".")[2].lower()]
    of_heads = [name for name in norms if name.endswith(("q_norm", "k_norm"))]
    return Sizes(
        hidden=hidden,
        queries=heads * width,
        keys=(first("num_key_value_heads") or heads) * width,
        inner=inner,
        layers=layers,
        vocabulary=config.vocab_size,
        norms=max(2, (len(norms) - len(of_heads)) // layers),
        head_norms=bool(of_heads),
    )


def layer_bytes(sizes: Sizes, *, saved: Saved, itemsize: int, fused: bool) -> int:
    """Count what one layer saves of a token until backward, float32 between layers.

    all: each norm its input and, unless fused, the input over its root mean square, in float32; each
    of five projections its own copy of what it reads; queries, keys, values and attention's output;
    gate, activation (unless fused), up and their product.
    gemms: what enters the layer, and the outputs of its GEMMs and attention. inputs: what enters.
    """
    d, q, k, f = sizes.hidden, sizes.queries, sizes.keys, sizes.inner
    if saved == "nothing":
        return 0
    if saved == "inputs":
        return 4 * d
    if saved == "gemms":
        return (4 + 2 * itemsize) * d + 2 * itemsize * (q + k) + 2 * itemsize * f
    norms = sizes.norms * (4 if fused else 8) * d
    heads = sizes.head_norms * (itemsize if fused else itemsize + 4) * (q + k)
    read = 5 * itemsize * d if itemsize < 4 else 2 * itemsize * d  # a copy each, if they are cast
    return norms + heads + read + 2 * itemsize * (q + k) + (3 if fused else 4) * itemsize * f


def token_bytes(sizes: Sizes, *, saved: Saved, itemsize: int, fused: bool) -> int:
    """Count what one token of a micro-batch takes at most, beside what stays."""
    held = layer_bytes(sizes, saved=saved, itemsize=itemsize, fused=fused)
    layer = layer_bytes(sizes, saved="all", itemsize=itemsize, fused=fused)
    # of the layer that runs: recomputed as a whole, or in float32 gradients of half of it
    works = layer if saved in ("all", "nothing") else 2 * layer
    ends = 16 * sizes.hidden  # the final norm, its gradient, the rows that the head reads
    return sizes.layers * held + works + ends


def held_bytes(
    weights: int,  # bytes of all parameters
    *,
    trained: int,  # parameters
    weight_bytes: int,  # of a trained one, and of its gradient
    state_bytes: int,  # of the optimiser for it
    head: int = 0,  # words times width of a trained head: its gradient in float32, being made
    cast: bool = False,  # autocast keeps trained weights in 16 bits too
    ranks: int = 1,  # over more than one DDP keeps gradients a second time, in its buckets
    sharded: bool = False,  # over the ranks: FSDP, ZeRO
    reference: int = 0,  # bytes of a live reference's weights
) -> int:
    """Count what stays on a device whatever the micro-batch."""
    buckets = weight_bytes * (ranks > 1 and not sharded)
    held = weights + trained * (weight_bytes + buckets + state_bytes)
    return held // (ranks if sharded else 1) + reference + 4 * head + 2 * trained * cast


def token_budget(
    memory: int,  # bytes of the device
    held: int,  # of them, see held_bytes
    a_token: int,  # see token_bytes
    *,
    least: int = LEAST,
) -> int:
    """Tokens of a micro-batch, a multiple of 1024: as many as fit, from `least` to MOST."""
    fits = max(0, int(USABLE * memory) - held) // a_token
    least = -(-least // STEP) * STEP
    return max(least, min(MOST, fits // STEP * STEP))


def state_bytes(optim: str, weight_bytes: int) -> int:
    """An optimiser's own, a trained parameter; of one that isn't known here, two moments."""
    if "8bit" in optim:
        return 2
    if optim.startswith(("adafactor", "galore", "apollo")):
        return 1  # rows and columns, or a low rank
    moments = 1 if optim.startswith(("sgd", "adagrad", "rmsprop", "lion")) else 2
    return moments * weight_bytes


def in_words(tokens: int, memory: int, held: int, a_token: int) -> str:
    gib = lambda size: f"{size / 2**30:.1f} GiB"
    said = f"at most {tokens} tokens of {gib(memory)}: {gib(held)} stay, {a_token / 2**20:.2f} MiB each"
    if tokens * a_token + held > USABLE * memory:
        return f"{said}, which may be too much; --max_tokens_per_batch takes another number"
    return said
