"""Decide which reference a training run has: cached in a scored store, or a live model.

Cached means that neither its trunk nor its checkpoint is loaded: the store carries what a method
needs of it, and its files on disk say whether it is the right one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from sepo.data.store.store import ScoredStore, template_hash, tokenizer_hash
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.model.base import adapted, base_of, has_adapters
from sepo.model.fingerprint import checkpoint_hash
from sepo.model.folder import ModelFolder
from sepo.model.forward import head
from sepo.model.frozen import (
    CachedReference,
    LiveReference,
    Reference,
    check_heads,
    token_logprob_kl,
)
from sepo.model.load import load_model
from sepo.model.prepare import has_storage, probed
from sepo.model.reads import Needed, no_reference

__all__ = [
    "CachedReference", "LiveReference", "Reference", "ReferenceFolder", "cached_reference",
    "load_reference", "resolve_reference", "token_logprob_kl",
]  # fmt: skip
WORDS = {"logp": "log-probabilities", "hidden": "hidden rows"}


@dataclass(frozen=True)
class ReferenceFolder:
    """A reference by its folder: found in the data that was scored with it, or loaded."""

    path: str | ModelFolder  # hub id or local directory
    data: Mapping[str, Sequence[TokenPair]]  # of the run, by the name that a message calls it
    tokenizer: PreTrainedTokenizerBase  # the policy's
    dtype: torch.dtype = torch.float32  # in which the policy computes
    weights_dtype: torch.dtype = torch.float32  # of the policy's weights
    attn_impl: str = "auto"
    trust_remote_code: bool = False
    adapters_stand_in: bool = False  # the policy without its adapters is it: never load it

    def find(self, needed: Needed) -> Reference | None:
        """Raises InputError as `cached_reference` and `load_model` do."""
        if self.adapters_stand_in:
            return cached_reference(
                self.path, self.data, self.tokenizer,
                keep=needed, dtype=self.dtype, trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
        return load_reference(
            self.path, self.data, self.tokenizer,
            keep=needed, dtype=self.dtype, weights_dtype=self.weights_dtype,
            attn_impl=self.attn_impl, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip


def resolve_reference(
    needed: Needed | None,  # by the method; None: it has no reference
    given: nn.Module | Reference | ReferenceFolder | None,
    policy: nn.Module,  # prepared, where it will run
    data: Sequence[TokenPair] | None,  # to train on; None: a run that only evaluates
    *,
    method: str,  # for messages
) -> Reference | None:
    """Decide what serves as the reference of a run: the only place that does.

    | the method needs | given | what decides | the reference |
    |---|---|---|---|
    | nothing | anything | | None |
    | anything | a folder | all its data keeps what is needed | CachedReference, compared by hash |
    | anything | a folder | else, and adapters stand in | as if nothing was given |
    | anything | a folder | else | LiveReference of the model, loaded |
    | anything | a model | | LiveReference of it, frozen |
    | anything | a LiveReference | unless of the policy without its adapters | itself, frozen |
    | logp, hidden | a CachedReference | | itself |
    | hidden | nothing | `data` is a store that keeps hidden rows | CachedReference |
    | anything | nothing | the policy has adapters | LiveReference of it without them |
    | logp | nothing | `data` carries log-probabilities | None: they come with the pairs |

    Raises InputError for a method that is left without, for cached rows where layers are needed,
    for a model that shares weights with the policy or that ZeRO-3 would shard, for a head that does
    not fit the policy's, and for adapters that change the policy before its first step.
    """
    if needed is None:
        return None
    if isinstance(given, ReferenceFolder):
        given = given.find(needed)
    if isinstance(given, LiveReference) and given.without_adapters and given.model is policy:
        given = None
    if isinstance(given, nn.Module):
        given = LiveReference(given)
    reference: Reference | None = None
    if isinstance(given, LiveReference):
        reference = _beside(policy, given)
    elif given is not None:
        reference = given
    elif needed == "hidden" and isinstance(data, ScoredStore) and needed in data.manifest["keep"]:
        reference = CachedReference(data.reference_head())
    elif has_adapters(policy):
        # pairs that carry log-probabilities say where training starts, whatever the adapters do
        carried = needed == "logp" and data is not None and _carries_logp(data)
        reference = LiveReference(policy, True) if carried else _without_adapters(policy)
    if isinstance(reference, CachedReference) and needed == "layers":
        raise InputError(
            f"--method {method}: expected a live reference, whose layers its mask reads, got cached rows"
        )
    if reference is None:
        if needed != "logp" or not _carries_logp(data):
            raise InputError(no_reference(method, needed))
    elif needed != "logp":
        _check_fits(policy, reference)
    return reference


def _beside(policy: nn.Module, live: LiveReference) -> LiveReference:
    """The live reference, frozen. Raises InputError for one that can't stay what it is."""
    if is_deepspeed_zero3_enabled():
        raise InputError(
            "ZeRO-3 shards every model that is loaded, but trains one: expected the reference's "
            "log-probabilities in the data (`sepo score --keep logp`), got a live reference"
        )
    _check_apart(policy, live.model)
    live.model.eval().requires_grad_(False)
    return live


def _check_apart(model: nn.Module, reference: nn.Module) -> None:
    """Raise InputError for a reference that would move with the policy."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if reference is model or any(id(p) in trained for p in reference.parameters()):
        raise InputError(
            "reference_model: expected a model of its own, got the policy or one that shares its "
            "weights; load it once more, or leave it out under LoRA"
        )


def _without_adapters(model: nn.Module) -> LiveReference:
    """Take a PeftModel, its adapters off, as its own reference.

    Raises InputError for adapters that change it already: training would not start at its reference.
    """
    reference = LiveReference(model, without_adapters=True)
    if not has_storage(base_of(model)):
        return reference
    logp = probed(model)
    with reference.frozen() as frozen:
        change = (logp - probed(frozen)).abs().max().item()
    # new LoRA adds zeros; what multiplies (DoRA, OFT) is rounded on the way, in 16 bits to be seen
    adds = all(
        c.peft_type == "LORA" and not c.use_dora for c in adapted(model).peft_config.values()
    )
    exact = adds or next(model.parameters()).dtype.itemsize >= 4
    if not change <= (1e-4 if exact else 0.1):
        raise InputError(
            f"the policy's adapters change its log-probabilities by {change:.2g} nats before the "
            "first step, so without them it is not the reference that training starts from: expected "
            "new adapters (merge_and_unload() these, and give peft_config), or reference_model="
        )
    return reference


def _check_fits(policy: nn.Module, reference: Reference) -> None:
    own = head(policy)
    if own.weight.numel():  # ZeRO-3 leaves nothing to look at
        # a store's is compared where it lies: nothing is moved for it
        stored = reference.stored if isinstance(reference, CachedReference) else None
        check_heads(own, stored or reference.head(own.weight))


def _carries_logp(data: Sequence[TokenPair] | None) -> bool:
    # a run that only evaluates has no training data; its first batch will tell
    return not data or getattr(data[0], "chosen_ref_logp", None) is not None


def load_reference(
    path: str | ModelFolder,  # hub id or local directory of the reference
    data: Mapping[str, Sequence[TokenPair]],  # by the name that a message calls it
    tokenizer: PreTrainedTokenizerBase,  # the policy's
    *,
    keep: Needed,
    dtype: torch.dtype = torch.float32,  # in which the policy computes
    weights_dtype: torch.dtype = torch.float32,  # of the policy's weights, and a live reference's
    attn_impl: str = "auto",
    trust_remote_code: bool = False,
) -> Reference:
    """Take the cached reference if all data carries it, else the live one; its type says which.

    Raises InputError as `cached_reference` and `load_model` do.
    """
    cached = cached_reference(
        path, data, tokenizer, keep=keep, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if cached is not None:
        return cached
    model = load_model(
        path, dtype=weights_dtype, attn_impl=attn_impl, trust_remote_code=trust_remote_code
    )
    return LiveReference(model.requires_grad_(False))


def cached_reference(
    path: str | ModelFolder,  # hub id or local directory of the reference
    data: Mapping[str, Sequence[TokenPair]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep: Needed,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> CachedReference | None:
    """Find what scored stores keep of the reference at `path`; None if some data keeps nothing.

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
    """Name what a store must have been scored with; hashes are made when they are compared."""

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


def _check_key(where: str, manifest: dict, wanted: _Key, keep: Needed, dtype: torch.dtype) -> None:
    scored_in = getattr(torch, manifest["reference_dtype"])
    if scored_in.itemsize < dtype.itemsize:
        raise InputError(
            f"{where}: expected a reference computed in {_name(dtype)} at least, got "
            f"{_name(scored_in)}; score again with --arithmetic {_name(dtype)}"
        )
    scored_with = (manifest["tokenizer"], manifest["chat_template"], manifest["reference"])
    expected = (
        ("tokenizer", lambda: wanted.tokenizer(manifest["tokenizer"])),
        ("chat template", lambda: wanted.template),
        ("weights", lambda: wanted.weights(scored_in)),  # last: it reads the whole checkpoint
    )
    for stored, (word, make) in zip(scored_with, expected, strict=True):
        if stored != (given := make()):
            raise InputError(
                f"{where}: expected the reference's {word} {given[:12]} ({wanted.path}), got "
                f"{stored[:12]}, with which its {WORDS[keep]} were scored"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
