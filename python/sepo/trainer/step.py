"""What a method's loss reads of one micro-batch, a number a token. It runs in the policy's forward."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sepo.data.store.store import ScoredStore
from sepo.data.types import PackedBatch, TokenPair
from sepo.errors import InputError
from sepo.masks import activation_mask, layer_activations, layer_states
from sepo.model.prepare import head, token_logprob
from sepo.model.reference import (
    CachedReference,
    LiveReference,
    Reference,
    check_heads,
    token_logprob_kl,
    without_adapters,
)
from sepo.model.routers import RouterLoss
from sepo.trainer.adapters import has_adapters
from sepo.trainer.config import SePOConfig
from sepo.trainer.methods import Method, TokenValues

MASK = "sparse_mask"  # the policy's submodule: only so do DDP and FSDP2 see its parameters


@dataclass(frozen=True)
class TokenStep:
    """Call it with the policy, inside its forward, and a batch."""

    method: Method
    args: SePOConfig
    reference: Reference | None
    router_loss: RouterLoss | None = None

    def __call__(self, model: nn.Module, batch: PackedBatch) -> TokenValues:
        routers = None if self.router_loss is None else []
        values = self._values(model, batch, routers)
        if routers is None:
            return values
        return values._replace(router_loss=self.router_loss(routers, batch))

    def _values(
        self, model: nn.Module, batch: PackedBatch, routers: list[Tensor] | None
    ) -> TokenValues:
        budget, direction = self.args.head_budget, self.method.direction
        if direction is None:
            logp = token_logprob(model, batch, budget=budget, routers=routers)
            return TokenValues(logp, self._ref_logp(batch))
        ref_hidden, read = self._read_reference(batch)
        values = token_logprob_kl(
            model,
            batch,
            self.reference,
            ref_hidden=ref_hidden,
            direction=direction(self.args),
            budget=budget,
            routers=routers,
        )
        # backward takes what came last first, and has let go of the layers before it is in the trunk
        return TokenValues(*values, *self._masks(model, batch, read))

    def _ref_logp(self, batch: PackedBatch) -> Tensor | None:  # (M,)
        if self.method.reference is None or batch.ref_logp is not None:
            return batch.ref_logp
        if not isinstance(self.reference, LiveReference):
            raise InputError(no_reference(self.args.method, self.method))
        return self.reference.logp(batch, budget=self.args.head_budget)

    def _read_reference(self, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Its states (N, D_ref), and what the mask reads of its layers; None where it has no need."""
        if not self._reads_layers:
            return None, None
        read = layer_activations if self.method.mask == "activation" else layer_states
        with self.reference.frozen() as reference:
            return read(reference, batch)

    def _masks(self, model: nn.Module, batch: PackedBatch, read: Tensor | None):
        """The reward's and the KL divergence's, (M,) each; none for a method without."""
        if self.method.mask is None:
            return ()
        if not self._reads_layers:
            drawn = batch.weights if batch.mask is None else batch.mask  # None: a batch of no pairs
            return drawn, drawn
        if self.method.mask == "learned":
            return getattr(model, MASK)(read)
        mask = activation_mask(read, batch.cu_rows, norm=self.args.mask_norm)
        return mask, mask

    @property
    def _reads_layers(self) -> bool:
        drawn = self.method.mask == "learned" and self.args.mask == "random"
        return self.method.mask is not None and not drawn


def find_reference(
    method: Method,
    name: str,  # of the method, for messages
    model: nn.Module,  # the policy, prepared
    given: nn.Module | Reference | None,
    data: Sequence[TokenPair] | None,
) -> Reference | None:
    """What serves as the method's reference: what was given, the adapters' absence, or the data.

    None if the method has none, or the pairs carry its log-probabilities. Raises InputError for a
    method that is left without, and for a reference whose head does not fit the policy's.
    """
    if method.reference is None:
        return None
    reference = given
    if isinstance(given, nn.Module):
        reference = LiveReference(given)
    if given is None and method.reference == "hidden" and _keeps_hidden(data):
        reference = CachedReference(data.reference_head())
    elif given is None and has_adapters(model):
        read = method.reference == "logp" and data is not None and _carries_logp(data)
        reference = LiveReference(model, True) if read else without_adapters(model)
    if isinstance(reference, CachedReference) and method.reference == "layers":
        raise InputError(
            f"--method {name}: expected a live reference, whose layers its mask reads, got cached rows"
        )
    if reference is None and (method.reference != "logp" or not _carries_logp(data)):
        raise InputError(no_reference(name, method))
    if method.direction is not None:
        _check_fits(model, reference)
    return reference


def no_reference(name: str, method: Method) -> str:
    ways = {
        "logp": "pairs with cached log-probabilities (`sepo score --keep logp`), or reference_model=",
        "hidden": "a store with cached states (`sepo score --keep hidden`), or reference_model=",
        "layers": "reference_model=",
    }
    return f"--method {name} needs a reference: {ways[method.reference]}"


def _check_fits(model: nn.Module, reference: Reference) -> None:
    own = head(model)
    if own.weight.numel():  # ZeRO-3 leaves nothing to look at
        cached = isinstance(reference, CachedReference)
        check_heads(own, reference.stored if cached else reference.head(own.weight))


def _keeps_hidden(data: Sequence[TokenPair] | None) -> bool:
    return isinstance(data, ScoredStore) and "hidden" in data.manifest["keep"]


def _carries_logp(data: Sequence[TokenPair] | None) -> bool:
    # a run that only evaluates has no training data; its first batch will tell
    return data is None or getattr(data[0], "chosen_ref_logp", None) is not None
