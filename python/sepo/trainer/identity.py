"""Which run a checkpoint is of: what must be the same to continue it, and what may change."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count

from sepo.data.store.store import ScoredStore
from sepo.errors import InputError
from sepo.flags.selection import selection_flags, uses_mass
from sepo.model.base import base_of
from sepo.model.fingerprint import UNREAD, quick_hash
from sepo.model.reference import CachedReference, LiveReference, Reference
from sepo.model.routers import router_loss
from sepo.trainer.checkpoints import read_mark
from sepo.trainer.config import SePOConfig
from sepo.trainer.methods import METHODS
from sepo.trainer.pairs import PreparedPairs, data_seed

RUN = {  # in the order of comparison -> how a message calls it
    "method": "--method",
    "pairs": "number of pairs",
    "pairs_per_step": "--pairs_per_step",
    "fraction": "--fraction",
    "rejected_fraction": "--rejected_fraction",
    "mass": "--mass",
    "first_token": "--first_token",
    "seed": "seed of the pairs' order (--data_seed, else --seed)",
    "contents": "data (hash of its pairs)",
    "scores": "scores (hash of those in the data)",
    "ref_logp": "reference (hash of its log-probabilities in the data)",
    "ref_hidden": "reference (hash of its hidden rows in the data)",
    "lengths": "data (hash of the lengths of its pairs)",
    "base": "base model (hash of the weights that are not trained)",
    "reference": "reference (hash of its weights)",
    "optim": "--optim",
    "lr_scheduler_type": "--lr_scheduler_type",
    "loss": "--{}",
    "adapters": "adapters with {}",
    "trained": "number of trained parameters",
    "weights": "dtype of the weights (--dtype)",
    "precision": "--{}",
    "model": "a model with {}",
    "reference_model": "a reference with {}",
}
GROUPS = {  # the whole of what RUN names one by one
    "loss": "settings of the loss",
    "adapters": "adapters",
    "precision": "precision",
    "model": "the model's configuration",
    "reference_model": "the reference's configuration",
}
PRECISION = ("bf16", "fp16", "tf32", "load_in_4bit", "load_in_8bit")
# of the state that a checkpoint holds: what changes is put into it
OF_THE_OPTIMISER = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "mask_learning_rate", "mask_weight_decay", "optim_args",
}  # fmt: skip
SELECTION = ("select", "rejected_select", "fraction", "rejected_fraction", "mass", "first_token")
# where a run lies and how it is told of, its identity, and what its identity has by contents
NO_CHANGE = {
    "output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "disable_tqdm",
    "log_level", "log_level_replica", "log_on_each_node", "push_to_hub", "local_rank", "do_train",
    "do_eval", "do_predict", "trust_remote_code", "dtype", "use_peft", "logging_nan_inf_filter",
    *SELECTION, *PRECISION, *RUN.keys() - {"seed", "reference"},  # which are flags by themselves
}  # fmt: skip
OTHERS = ("hub_", "trackio_", "lora_")  # the same by the beginning of a name


def describe_run(
    model: nn.Module,
    args: SePOConfig,
    pairs: PreparedPairs,
    *,
    data: Any = None,  # what the pairs were prepared from
    reference: Reference | None = None,
    read: bool = True,  # False: without hashes of weights, where another rank makes them
) -> dict:
    """List what must be the same for a checkpoint to be continued, whatever the number of ranks."""
    method = METHODS[args.method]
    selects = method.positions in ("selected", "random")
    lengths = np.stack([pairs.lengths, pairs.selected]).astype("<i8").tobytes()
    selection = selection_flags(args)
    return {
        "method": args.method,
        "pairs": len(pairs),
        "pairs_per_step": args.pairs_per_step,
        "fraction": selection["fraction"] if selects else None,
        "rejected_fraction": selection["rejected_fraction"] if selects else None,
        "mass": selection["mass"] if selects and uses_mass(args) else None,
        "first_token": selection["first_token"] if selects else None,
        "seed": data_seed(args),
        "contents": None,
        "scores": None,
        "ref_logp": None,
        **pairs.hashes,
        "ref_hidden": _hidden_rows(reference, data),
        "lengths": hashlib.sha256(lengths).hexdigest()[:16],
        "base": quick_hash(model, frozen=True) if read else UNREAD,
        "reference": _reference(reference, data) if read else UNREAD,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "loss": {name: getattr(args, name) for name in method.settings},
        "adapters": _adapters(model),
        "trained": get_model_param_count(model, trainable_only=True),
        "weights": ", ".join(sorted({_name(p.dtype) for p in model.parameters()})),
        "precision": {name: getattr(args, name) for name in PRECISION} | _kernels(args),
        "model": _config(model),
        "reference_model": _reference_config(reference),
    }


def describe_flags(args: SePOConfig) -> dict:
    """List what may change when a run goes on, and is said then: name -> value, as JSON has it."""
    of_methods = {name for method in METHODS.values() for name in method.settings}
    names = [f.name for f in fields(args) if f.name not in NO_CHANGE | of_methods]
    flags = {name: getattr(args, name) for name in names if not name.startswith(OTHERS)}
    return _plain(flags) | {"ranks": args.world_size, "device": args.device.type}


def check_same_run(checkpoint: str | Path, run: dict) -> None:
    """Raises InputError, naming the first difference, for a checkpoint of another run."""
    mark = read_mark(checkpoint)
    if mark is None:
        return
    found = _in_words(_plain(run))
    for words, expected in _in_words(mark["run"]).items():
        # a setting of one version that the other does not have can't be told
        if UNREAD not in (expected, got := found.get(words, expected)) and expected != got:
            raise InputError(
                f"{checkpoint} is of another run: expected {words} {expected}, got {got}"
            )


def changed_flags(mark: dict, flags: dict) -> dict[str, tuple]:
    """Name -> its value when the checkpoint was written, and now."""
    before = mark.get("flags", {})
    return {
        name: (before[name], now)
        for name, now in flags.items()
        if name in before and before[name] != now
    }


def notes(mark: dict, run: dict, flags: dict) -> list[str]:
    """Say what a user should know of going on from a checkpoint."""
    lines = []
    if changed := changed_flags(mark, flags):
        words = [f"{_flag(name)} {now} (was {was})" for name, (was, now) in changed.items()]
        lines.append(f"goes on with {', '.join(words)}")
    known = [key for key in RUN if run[key] not in (None, {})]  # not what this run has nothing of
    unread = [key for key in known if UNREAD in (mark["run"].get(key), run[key])]
    for why, keys in (
        (
            "an older version did not write them down",
            [k for k in known if k not in mark["run"] and k not in unread],
        ),
        ("weights in shards", unread),
    ):
        if keys:
            words = [GROUPS.get(key, RUN[key]) for key in keys]
            lines.append(f"was not compared ({why}): {'; '.join(words)}")
    return lines


def _flag(name: str) -> str:
    words = {"ranks": "number of ranks", "device": "device"}
    return words.get(name, f"--{name}")


def _in_words(run: dict) -> dict:
    """The run as a message calls it; its method comes first, and decides which flags follow."""
    found: dict[str, Any] = {}
    for key, words in RUN.items():
        if "{}" in words:
            found |= {words.format(name): v for name, v in run.get(key, {}).items()}
        elif key in run:
            found[words] = run[key]
    return found


def _reference(reference: Reference | None, data: Any) -> str | None:
    if isinstance(reference, LiveReference):
        # without its adapters the policy is its base model, which is compared anyway
        return None if reference.without_adapters else quick_hash(reference.model)
    cached = isinstance(reference, CachedReference) and reference.stored is not None
    if cached and isinstance(data, ScoredStore):
        return f"{data.manifest.get('reference')}"[:16]
    return None


def _reference_config(reference: Reference | None) -> dict:
    """The same weights under another configuration are another reference."""
    if not isinstance(reference, LiveReference) or reference.without_adapters:
        return {}
    return _config(reference.model)


def _hidden_rows(reference: Reference | None, data: Any) -> str | None:
    cached = isinstance(reference, CachedReference) and reference.stored is not None
    return data.hidden_hash() if cached and isinstance(data, ScoredStore) else None


def _kernels(args: SePOConfig) -> dict:
    """On a GPU, which kernels round between the products: `auto` depends on what is installed.

    A CPU has not all of them, and a run may move there: that is said, as another device.
    """
    return {"fused_layers": args.fused_layers} if args.device.type != "cpu" else {}


def _adapters(model: nn.Module) -> dict:
    """Read what peft was told, by the adapter's name; where it came from does not count."""
    told = getattr(model, "peft_config", None)
    if not isinstance(told, dict):
        return {"peft_type": None}
    here = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
    found: dict[str, Any] = {}
    for adapter, config in told.items():
        name = "" if adapter == "default" else f"{adapter}."
        found |= {f"{name}{k}": v for k, v in config.to_dict().items() if k not in here}
    return _plain(found)


def _config(model: nn.Module) -> dict:
    """The model's configuration, but for what loading and training may set."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    here = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
    known = config.to_dict().items()
    kept = {k: v for k, v in known if k not in here and k[0] != "_" and not k.endswith("_token_id")}
    return _plain(kept | _in_force(model))


def _in_force(model: nn.Module) -> dict:
    """Numbers that the model took from its configuration when it was made, and reads ever since."""
    found = {}
    # this token's own embedding gets no gradient; its id in the configuration is anybody's to set
    padding = getattr(base_of(model).get_input_embeddings(), "padding_idx", None)
    if padding is not None:
        found["padding_idx"] = padding
    if (routers := router_loss(model)) is not None:
        found["router_aux_loss_coef"] = routers.coefficient
        found["experts of the router loss"] = routers.num_experts
        found["experts per token of the router loss"] = routers.top_k
    return found


def _plain(value: Any) -> Any:
    """Turn a value into what JSON gives back of it; sets in order."""

    def default(other):
        return sorted(map(str, other)) if isinstance(other, set | frozenset) else str(other)

    return json.loads(json.dumps(value, default=default))


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
