"""The reference of a training run: cached in a scored store, or a live model.

Cached means that neither its trunk nor its checkpoint is loaded: the store carries what a method
needs of it, and its files on disk say whether it is the right one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sepo.data.hidden import StoredHead
from sepo.data.store.store import ScoredStore, template_hash, tokenizer_hash
from sepo.data.types import PackedBatch, TokenPair
from sepo.errors import InputError
from sepo.model.fingerprint import checkpoint_hash
from sepo.model.folder import ModelFolder
from sepo.model.prepare import (
    Head,
    head,
    hidden_states,
    load_model,
    probe_logprob,
    token_logprob,
)
from sepo.ops import selected_logprob_kl

Keep = Literal[
    "logp", "hidden", "layers"
]  # what a method reads of its reference; none keeps layers
WORDS = {"logp": "log-probabilities", "hidden": "hidden rows"}


class CachedReference:
    """What a scored store keeps of a reference; pairs carry the rest of it into the batch."""

    def __init__(self, stored: StoredHead | None):  # None: only log-probabilities are kept
        self.stored, self._head = stored, None

    def head(self, like: Tensor) -> Head:
        """The head in `like`'s dtype and on its device; moved there once."""
        if self.stored is None:
            raise InputError(
                "expected a store with the reference's hidden rows (`sepo score --keep hidden`), "
                "got one with log-probabilities alone"
            )
        if self._head is None or _kind(self._head.weight) != _kind(like):
            weight, bias, scale, softcap = self.stored
            self._head = Head(_as(weight, like), _as(bias, like), scale, softcap)
        return self._head

    def hidden(self, batch: PackedBatch, like: Tensor) -> Tensor:  # (N, D_ref)
        """The cached rows where the batch reads them; the other rows hold anything."""
        width = self.stored.weight.shape[1]
        rows = like.new_empty(len(batch.tokens), width)
        if batch.ref_hidden is not None:
            # a row that is read twice is the prompt's last: both responses cached the same state
            rows[batch.rows] = _as(batch.ref_hidden, like)
        elif len(batch.rows):
            raise InputError("expected pairs with the reference's hidden rows, got some without")
        return rows


@dataclass(frozen=True)
class LiveReference:
    """A prepared model that runs beside the policy, without gradients."""

    model: nn.Module  # a PreTrainedModel, or a PeftModel
    without_adapters: bool = False  # the policy itself, as it was before LoRA

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The model as the reference, for the time of one reading."""
        with (
            torch.no_grad(),
            self.model.disable_adapter() if self.without_adapters else nullcontext(),
        ):
            yield self.model

    def logp(self, batch: PackedBatch, *, budget: int | None = None) -> Tensor:  # (M,) float32
        with self.frozen() as model:
            return token_logprob(model, batch, budget=budget)

    def head(self, like: Tensor) -> Head:
        with self.frozen() as model:
            weight, bias, scale, softcap = head(model)
            return Head(_as(weight, like), _as(bias, like), scale, softcap)

    def hidden(self, batch: PackedBatch, like: Tensor) -> Tensor:  # (N, D_ref)
        with self.frozen() as model:
            return _as(hidden_states(model, batch), like)


Reference = CachedReference | LiveReference


def without_adapters(model: nn.Module) -> LiveReference:
    """A PeftModel, its adapters off, as its own reference.

    Raises InputError for adapters that change it already: training would not start at its reference.
    """
    reference = LiveReference(model, without_adapters=True)
    logp = probe_logprob(model)
    if logp is None:
        return reference
    with reference.frozen() as frozen:
        change = (logp - probe_logprob(frozen)).abs().max().item()
    # new LoRA adds zeros; what multiplies (DoRA, OFT) is rounded on the way, in 16 bits to be seen
    adds = all(c.peft_type == "LORA" and not c.use_dora for c in model.peft_config.values())
    exact = adds or next(model.parameters()).dtype.itemsize >= 4
    if not change <= (1e-4 if exact else 0.1):
        raise InputError(
            f"the policy's adapters change its log-probabilities by {change:.2g} nats before the "
            "first step, so without them it is not the reference that training starts from: expected "
            "new adapters (merge_and_unload() these, and give peft_config), or reference_model="
        )
    return reference


def check_apart(model: nn.Module, reference: nn.Module) -> None:
    """Raise InputError for a reference that would move with the policy."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if reference is model or any(id(p) in trained for p in reference.parameters()):
        raise InputError(
            "reference_model: expected a model of its own, got the policy or one that shares its "
            "weights; load it once more, or leave it out under LoRA"
        )


def token_logprob_kl(
    model: PreTrainedModel,
    batch: PackedBatch,
    reference: Reference,
    *,
    ref_hidden: Tensor | None = None,  # (N, D_ref) its states, where they were read already
    direction: str = "ref||policy",  # or "policy||ref"
    budget: int | None = None,  # bytes, see selected_logprob_kl
    impl: str = "auto",
    routers: list[Tensor] | None = None,  # the policy's, see hidden_states
) -> tuple[Tensor, Tensor, Tensor]:  # logp, ref_logp, kl: (M,) float32, nats
    """Both models' log-probability of every selected token, and the KL divergence at its row.

    Gradients reach the policy alone. Cached rows are bfloat16: the result is that of a live
    reference whose states are rounded to it. Call it inside the wrapped module's forward, as
    `token_logprob`. Raises InputError for a reference whose head does not fit the policy's.
    """
    hidden, own = hidden_states(model, batch, routers=routers), head(model)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        own = own._replace(weight=_as(own.weight, hidden), bias=_as(own.bias, hidden))
    ref = reference.head(hidden)
    check_heads(own, ref)
    ref_hidden = reference.hidden(batch, hidden) if ref_hidden is None else _as(ref_hidden, hidden)
    return selected_logprob_kl(
        hidden,
        own.weight,
        ref_hidden,
        ref.weight,
        batch.rows,
        batch.targets,
        direction=direction,
        bias=own.bias,
        ref_bias=ref.bias,
        scale=own.scale,
        softcap=own.softcap,
        budget=budget,
        impl=impl,
    )


def load_reference(
    path: str | ModelFolder,  # hub id or local directory of the reference
    data: Mapping[str, Sequence[TokenPair]],  # by the name that a message calls it
    tokenizer: PreTrainedTokenizerBase,  # the policy's
    *,
    keep: Keep,
    dtype: torch.dtype = torch.float32,  # in which the policy computes
    weights_dtype: torch.dtype = torch.float32,  # of the policy's weights, and a live reference's
    attn_impl: str = "auto",
    trust_remote_code: bool = False,
) -> Reference:
    """The cached reference if all data carries it, else the live one; says which by its type.

    Raises InputError as `cached_reference` and `load_model` do.
    """
    code = dict(trust_remote_code=trust_remote_code)
    cached = cached_reference(path, data, tokenizer, keep=keep, dtype=dtype, **code)
    if cached is not None:
        return cached
    model = load_model(path, dtype=weights_dtype, attn_impl=attn_impl, **code)
    return LiveReference(model.requires_grad_(False))


def cached_reference(
    path: str | ModelFolder,  # hub id or local directory of the reference
    data: Mapping[str, Sequence[TokenPair]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep: Keep,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> CachedReference | None:
    """What scored stores keep of the reference at `path`; None if some data keeps nothing of it.

    Raises InputError for a store, needed or not, whose reference has other weights, another
    tokenizer or chat template, or was computed in a lower precision than the policy.
    """
    stores = {
        name: pairs
        for name, pairs in data.items()
        if isinstance(pairs, ScoredStore) and keep in pairs.manifest["keep"]
    }
    wanted = _Key(path, tokenizer, trust_remote_code)
    for name, store in stores.items():
        _check_key(name, store.manifest, wanted, keep, dtype)
    if not stores or len(stores) < len(data):
        return None
    first = next(iter(stores.values()))
    return CachedReference(first.reference_head() if keep == "hidden" else None)


class _Key:
    """What a store must have been scored with; hashes are made when they are compared."""

    def __init__(
        self, path: str | ModelFolder, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
    ):
        self.path, self._tokenizer, self._trust = path, tokenizer, trust_remote_code
        self._weights: dict[torch.dtype, str] = {}

    def tokenizer(self, stored: str) -> str:
        return tokenizer_hash(self._tokenizer, like=stored)

    @cached_property
    def template(self) -> str:
        return template_hash(self._tokenizer)

    def weights(self, dtype: torch.dtype) -> str:
        if dtype not in self._weights:
            self._weights[dtype] = checkpoint_hash(
                self.path, dtype=dtype, trust_remote_code=self._trust
            )
        return self._weights[dtype]


def _check_key(where: str, manifest: dict, wanted: _Key, keep: Keep, dtype: torch.dtype) -> None:
    scored_in = getattr(torch, manifest["reference_dtype"])
    if scored_in.itemsize < dtype.itemsize:
        raise InputError(
            f"{where}: expected a reference computed in {_name(dtype)} at least, got "
            f"{_name(scored_in)}; score again with --dtype {_name(dtype)}"
        )
    found = (manifest["tokenizer"], manifest["chat_template"], manifest["reference"])
    expected = (
        ("tokenizer", lambda: wanted.tokenizer(manifest["tokenizer"])),
        ("chat template", lambda: wanted.template),
        ("weights", lambda: wanted.weights(scored_in)),  # last: it reads the whole checkpoint
    )
    for stored, (word, make) in zip(found, expected, strict=True):
        if stored != (given := make()):
            raise InputError(
                f"{where}: expected the reference's {word} {given[:12]} ({wanted.path}), got "
                f"{stored[:12]}, with which its {WORDS[keep]} were scored"
            )


def check_heads(own: Head, ref: Head) -> None:
    """Raise InputError for a reference whose logits can't be compared with the policy's."""
    vocabulary = len(own.weight), len(ref.weight)
    pairs = {
        "vocabulary": vocabulary,
        "logit scale": (own.scale, ref.scale),
        "logit soft cap": (own.softcap, ref.softcap),
    }
    for word, (expected, found) in pairs.items():
        if expected != found:
            raise InputError(f"reference: expected the policy's {word}, {expected}, got {found}")


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
