"""The methods without any of the tricks: one sequence at a time, all logits, plain masks."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from sepo.data import random_positions
from sepo.data.selection import random_mask

# of the architectures whose masks are compared: layers, and in each feed-forward and attention
PARTS = {
    "llama": ("model.layers", "mlp", "self_attn"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention"),
}


def random_triples(rng: np.random.Generator, *, pairs: int, vocab_size: int, longest: int = 9):
    """(prompt, chosen, rejected) token ids of random lengths >= 1."""
    draw = lambda: rng.integers(0, vocab_size, rng.integers(1, longest + 1)).astype(np.int32)
    return [(draw(), draw(), draw()) for _ in range(pairs)]


def dense_token_logprob(model, prompt: np.ndarray, response: np.ndarray) -> Tensor:  # (T,)
    """Log-probability of every response token from one ordinary pass over one sequence."""
    return _gather(_log_softmax(model, prompt, response), response)


def dense_losses(model, reference, pairs, args) -> Tensor:  # (P,)
    """The loss of every pair by its method's formula, written out.

    reference: a model of the same vocabulary, None where the pairs carry its log-probabilities.
    A learned mask's parameters are those of `model.sparse_mask`.
    """
    formula = FORMULAS[args.method]
    read = lambda pair, side: _response(model, reference, pair, side, args)
    return torch.stack([formula(read(p, "chosen"), read(p, "rejected"), args) for p in pairs])


# The formulas: c and r hold, of each response token, what `_response` says


def _log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def _total(y, values):
    return (y.weight * values).sum()


def _mean(y, values):
    return _total(y, values) / y.weight.sum()


def _sft(c, r, a):
    return -_total(c, c.logp)


def _dpo(c, r, a):
    h, e = a.beta * (_total(c, c.ratio) - _total(r, r.ratio)), a.label_smoothing
    return -(1 - e) * _log_sigmoid(h) - e * _log_sigmoid(-h)


def _ipo(c, r, a):
    over = _mean if a.ipo_reduce == "mean" else _total
    return (over(c, c.ratio) - over(r, r.ratio) - 1 / (2 * a.beta)) ** 2


def _dpop(c, r, a):
    chosen, rejected = _total(c, c.ratio), _total(r, r.ratio)
    return -_log_sigmoid(a.beta * (chosen - rejected - a.dpop_lambda * (-chosen).clamp(min=0)))


def _tdpo1(c, r, a):
    h = _total(c, c.ratio) - _total(r, r.ratio)
    return -_log_sigmoid(a.beta * (h - (_total(r, r.kl_forward) - _total(c, c.kl_forward))))


def _tdpo2(c, r, a):
    h = _total(c, c.ratio) - _total(r, r.ratio)
    drift = _total(r, r.kl_forward) - _total(c, c.kl_forward).detach()
    return -_log_sigmoid(a.beta * (h - a.tdpo2_alpha * drift))


def _mapo(c, r, a):
    u = _total(c, c.reward_mask * c.ratio) - _total(r, r.reward_mask * r.ratio)
    if a.form == "released":
        d = _total(c, c.kl_mask * c.kl_forward) - _total(r, r.kl_mask * r.kl_forward)
        return -_log_sigmoid(a.beta * (u + d))
    d = _total(c, c.kl_mask * c.kl_reverse) - _total(r, r.kl_mask * r.kl_reverse)
    return -_log_sigmoid(a.beta * (u - d))


def _sparsepo(c, r, a):
    l1_reward = _total(c, c.reward_mask) + _total(r, r.reward_mask)
    l1_kl = _total(c, c.kl_mask) + _total(r, r.kl_mask)
    return _mapo(c, r, a) + a.mask_l1 * l1_reward + a.kl_mask_l1 * l1_kl


def _simpo(c, r, a):
    h = a.beta * (_mean(c, c.logp) - _mean(r, r.logp))
    return -_log_sigmoid(h - a.beta * a.gamma_beta_ratio)


def _confpo(c, r, a):
    if not c.weight.any() or not r.weight.any():
        return 0 * (c.logp.sum() + r.logp.sum())
    return _simpo(c, r, a)


def _rrhf(c, r, a):
    nll = -(_total if a.sft_reduce == "sum" else _mean)(c, c.logp)
    return (_mean(r, r.logp) - _mean(c, c.logp)).clamp(min=0) + a.sft_weight * nll


def _sepo(c, r, a):
    return -_log_sigmoid(a.gamma * (_mean(c, c.logp) - _mean(r, r.logp)) - a.margin)


FORMULAS = {
    "sft": _sft, "dpo": _dpo, "ipo": _ipo, "dpop": _dpop, "tdpo1": _tdpo1, "tdpo2": _tdpo2,
    "mapo": _mapo, "sparsepo": _sparsepo, "simpo": _simpo, "rrhf": _rrhf, "sepo": _sepo,
    "confpo": _confpo, "selective-dpo": _dpo, "sepo-rand": _sepo, "sepo-entropy": _sepo,
}  # fmt: skip


# What they read


def _response(model, reference, pair, side, args) -> SimpleNamespace:
    prompt, response = pair.prompt, getattr(pair, side)
    log_p = _log_softmax(model, prompt, response)  # (T, V)
    y = SimpleNamespace(logp=_gather(log_p, response), weight=_weight(pair, side, args).to(log_p))
    y.entropy = -(log_p.exp() * log_p).sum(-1)
    if reference is None:
        ref_logp = getattr(pair, f"{side}_ref_logp", None)
        y.ratio = None if ref_logp is None else y.logp - torch.from_numpy(ref_logp)
        y.weight = y.weight * _kept(y, side, args)
        return y
    with torch.no_grad():
        log_q = _log_softmax(reference, prompt, response)
    y.ratio = y.logp - _gather(log_q, response)
    y.weight = y.weight * _kept(y, side, args)
    y.kl_forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    y.kl_reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    if args.method == "mapo":
        y.reward_mask = y.kl_mask = _activation_mask(reference, prompt, response, y.weight, args)
    elif args.method == "sparsepo" and args.mask_kind == "random":
        drawn = random_mask(len(response), seed=args.seed, key=f"{pair.id}/{side}/mask")
        y.reward_mask = y.kl_mask = torch.from_numpy(drawn)
    elif args.method == "sparsepo":
        mask, states = model.sparse_mask, _states(reference, prompt, response)
        y.reward_mask = y.kl_mask = _learned_mask(mask.reward, states, args)
        if args.independent_masks:
            y.kl_mask = _learned_mask(mask.kl, states, args)
    return y


def _weight(pair, side, args) -> Tensor:  # (T,): the user's, else 1 where the token is selected
    T, own = len(getattr(pair, side)), getattr(pair, f"{side}_weight")
    if own is not None:
        return torch.from_numpy(own)
    K = max(1, int(args.fraction * T + 1e-9))
    used = range(T)
    if args.method == "sepo":
        score, sign = getattr(pair, f"{side}_score"), -1 if side == "chosen" else 1
        used = sorted(range(T), key=lambda t: (sign * score[t], t))[:K]
    elif args.method == "sepo-rand":
        used = random_positions(T, args.fraction, seed=args.seed, key=f"{pair.id}/{side}")
    weight = torch.zeros(T)
    weight[[int(t) for t in used]] = 1
    return weight


@torch.no_grad()
def _kept(y, side, args) -> Tensor:  # (T,) 1 for the tokens that a rule leaves in, of those used
    used = y.weight > 0
    if args.method == "confpo":
        probability = y.logp.exp()
        return probability < probability[used].mean()
    if args.method == "selective-dpo":
        behind = -y.ratio if side == "chosen" else y.ratio
        return behind >= torch.quantile(behind[used], args.selection_quantile)
    if args.method == "sepo-entropy":
        of = [t for t in range(len(used)) if used[t]]
        K = max(1, int(args.fraction * len(of) + 1e-9))
        highest = sorted(of, key=lambda t: (-y.entropy[t].item(), t))[:K]
        return torch.zeros_like(y.weight).index_fill(0, torch.tensor(highest), 1)
    return torch.ones_like(y.weight)


def _log_softmax(model, prompt, response) -> Tensor:  # (T, V) at what predicts each token
    logits = model(input_ids=_ids(prompt, response), use_cache=False).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def _gather(log_p, response) -> Tensor:  # (T, V) -> (T,)
    return log_p.gather(-1, torch.from_numpy(response).long()[:, None])[:, 0]


def _ids(prompt, response) -> Tensor:  # (1, T0 + T)
    return torch.from_numpy(np.concatenate([prompt, response])).long()[None]


@torch.no_grad()
def _states(reference, prompt, response) -> list[Tensor]:  # L x (T, D_ref)
    output = reference(input_ids=_ids(prompt, response), use_cache=False, output_hidden_states=True)
    return [state[0, len(prompt) - 1 : -1] for state in output.hidden_states[1:]]


def _learned_mask(part, states, args) -> Tensor:  # (T,)
    total = 0
    for state, weight, bias, mixer in zip(states, part.weight, part.bias, part.mixer, strict=True):
        if args.mask_layernorm:
            centred = state - state.mean(-1, keepdim=True)
            state = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            state = state * part.norm.weight + part.norm.bias
        total = total + mixer * (state @ weight + bias).clamp(min=0)
    mask = total.clamp(min=0)
    return mask if args.mask_kind == "learned" else (mask > 0).to(mask) + mask - mask.detach()


@torch.no_grad()
def _activation_mask(reference, prompt, response, weight, args) -> Tensor:  # (T,)
    where, *names = PARTS[reference.config.model_type]
    seen = []
    keep = lambda module, inputs, output: seen.append(
        (output[0] if isinstance(output, tuple) else output).reshape(-1, output[0].shape[-1])
    )
    layers = reference.get_submodule(where)
    modules = [m for layer in layers for m in (layer, *map(layer.get_submodule, names))]
    hooks = [module.register_forward_hook(keep) for module in modules]
    reference(input_ids=_ids(prompt, response), use_cache=False)
    for hook in hooks:
        hook.remove()
    masks, used = [], weight > 0
    for output in seen:
        a = output[len(prompt) - 1 : -1].mean(-1)
        of = a[used]  # the response's tokens, as far as the loss uses them
        if of.max() == of.min():
            unit = torch.ones_like(a)
        elif args.mask_norm == "minmax":
            unit = (a - of.min()) / (of.max() - of.min())
        else:
            unit = (a - of.mean()) / (of - of.mean()).square().mean().sqrt()
        masks.append(unit)
    return sum(masks) / len(masks)
