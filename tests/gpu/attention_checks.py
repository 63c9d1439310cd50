"""What is asked of the attention on a GPU; functions of the device, so that a CPU rehearses them."""

import numpy as np
import torch
from dense import random_triples
from numerics import assert_as_accurate
from plain_attention import plain, visible_rows
from tiny import V, tiny_model

from bench.measure import peak_bytes
from sepo.attention import PackedLayout
from sepo.data import all_positions, pack, truncate
from sepo.model.forward import token_logprob
from sepo.model.prepare import prepare_model

# blocks of 128 rows that are whole, part and empty; a rejected response that is missing
LENGTHS = [(150, 70, 200), (5, 0, 40), (60, 90, 0), (1, 1, 1), (33, 140, 20)]
OPTIONS = {"full": {}, "window": dict(window=37), "capped": dict(softcap=20.0)}
# a model of a real one's shape in small: three query heads a key head, heads of width 64
SHAPE = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1, head_dim=64)


def batch_of(lengths, seed=0):
    """Every response token selected; a response of n + 1 tokens reads n."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, V, n).astype(np.int32)
    whole = lambda n: truncate(draw(n + 1), all_positions(n + 1))
    return pack([(draw(p), whole(c), whole(r)) for p, c, r in lengths])


def attention(impl, device, dtype, heads, options, lengths=LENGTHS):
    """Values and gradients against the definition in float64, beside the definition in dtype."""
    batch = batch_of(lengths)
    H, H_kv, E = heads
    g = torch.Generator().manual_seed(1)
    N = len(batch.tokens)
    inputs = [
        torch.randn(1, h, N, E, generator=g).to(dtype).double().requires_grad_()
        for h in (H, H_kv, H_kv)
    ]
    upstream = torch.randn(1, N, H, E, generator=g).to(dtype).double()
    visible = visible_rows(batch.spans, window=options.get("window")).to(device)

    def definition(query, key, value):
        found = plain(
            query[0], key[0], value[0], visible, scale=0.2, softcap=options.get("softcap")
        )
        return found.transpose(0, 1)[None]

    def packed(query, key, value):
        return PackedLayout(batch.to(device), impl).attend(query, key, value, scale=0.2, **options)

    def results(function, precision):
        own = [x.detach().to(device, precision).requires_grad_() for x in inputs]
        value = function(*own)
        return [value, *torch.autograd.grad(value, own, upstream.to(device, precision))]

    truth = results(definition, torch.float64)
    rows = zip(
        ("output", "query", "key", "value"), results(packed, dtype), results(definition, dtype),
        truth, strict=True,
    )  # fmt: skip
    for what, found, baseline, exact in rows:
        assert_as_accurate(found, baseline, exact, what=f"{impl} {dtype} {what}")


def model(impl, device, dtype, arch="llama", **overrides):
    """Log-probabilities and all gradients, packed, against separate passes: both beside float64."""
    triples = random_triples(np.random.default_rng(3), pairs=4, vocab_size=V, longest=40)
    errors = {}
    truth = None
    for name, precision, attn_impl in (
        ("truth", torch.float64, None), ("packed", dtype, impl), ("separate", dtype, None),
    ):  # fmt: skip
        own = tiny_model(arch, dtype=precision, **SHAPE | overrides)
        own.load_state_dict(tiny_model(arch, dtype=dtype, **SHAPE | overrides).state_dict())
        own.to(device)
        values = [v.detach().double() for v in _values(own, triples, attn_impl, device)]
        if truth is None:
            truth = values
        else:
            errors[name] = [
                ((a - b).norm() / b.norm()).item() for a, b in zip(values, truth, strict=True)
            ]
    # of each tensor: rounding is luck, another function is not
    floor = 4 * torch.finfo(dtype).eps
    for packed, separate in zip(errors["packed"], errors["separate"], strict=True):
        assert packed <= 1.5 * separate + floor, errors
    # that bound would hold for two of the same wrong function; gradients of a tensor can be noise
    assert errors["packed"][0] < 0.05, errors


def _values(own, triples, attn_impl, device):
    if attn_impl is not None:
        whole = lambda response: truncate(response, all_positions(len(response)))
        batch = pack([(p, whole(c), whole(r)) for p, c, r in triples]).to(device)
        logp = token_logprob(prepare_model(own, attn_impl=attn_impl), batch)
    else:
        logp = torch.cat(
            [_separate(own, p, y, device) for p, c, r in triples for y in (c, r)]
        )  # fmt: skip
    upstream = torch.randn(len(logp), generator=torch.Generator().manual_seed(1))
    logp.backward(upstream.to(logp))
    return [logp, *(p.grad for p in own.parameters())]


def _separate(own, prompt, response, device):
    ids = torch.from_numpy(np.concatenate([prompt, response])).long().to(device)
    logits = own(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=precise).gather(-1, ids[len(prompt) :, None])[:, 0]


def step(impl, device, dtype, arch="llama", autocast=False, **overrides):
    """A call that goes forward and backward once and leaves the gradients."""
    own = prepare_model(
        tiny_model(arch, dtype=dtype, **SHAPE | overrides).to(device), attn_impl=impl
    ).train()
    batch = batch_of(LENGTHS).to(device)

    def call():
        own.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logp = own(batch=batch)
        logp.sum().backward()
        return [p.grad for p in own.parameters()]

    return call


def repeatable(impl, device, dtype):
    """The same bits twice, shared prompts included, where deterministic algorithms are asked for."""
    call = step(impl, device, dtype)
    first = [grad.clone() for grad in call()]
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


def memory(impl, device, dtype, *, prompt, response, pairs, heads):
    """Forward and backward hold a few times the inputs, nothing with a square of the rows."""
    batch = batch_of([(prompt, response, response)] * pairs).to(device)
    H, H_kv, E = heads
    N = len(batch.tokens)
    inputs = [
        torch.randn(1, h, N, E, dtype=dtype, device=device, requires_grad=True)
        for h in (H, H_kv, H_kv)
    ]
    upstream = torch.randn(1, N, H, E, dtype=dtype, device=device)

    def call():
        value = PackedLayout(batch, impl).attend(*inputs, scale=None)
        return torch.autograd.grad(value, inputs, upstream)

    call()  # workspaces and compiled kernels stay
    # output, its gradient and float32 sums of the gradients; keys and values once more, twice
    few = 16 * N * H * E * dtype.itemsize
    assert few < N * N, "the bound would not notice a mask over all rows"
    peak = peak_bytes(call, device)
    assert peak < few, f"{impl}: {peak} bytes, expected less than {few}"
