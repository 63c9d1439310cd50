"""Find out once what a model's folder holds, from its small files; read it whole or not at all.

A folder is a model, or an adapter on another folder: that one is loaded first, the adapter merged
into it. Whatever is neither is refused by name, before anything large is read.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from sepo.errors import InputError

WEIGHTS = "model.safetensors"  # looked for in this order, as transformers does
INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"}
WRAPPERS = {"_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP"}  # marks of theirs
UNREADABLE = (  # what transformers makes of a configuration that can't be, among others
    OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, SafetensorError, StrictDataclassError,
)  # fmt: skip


class Adapter(NamedTuple):
    """Name what a folder holds that is no model of its own."""

    config: dict  # its adapter_config.json
    base: "ModelFolder"  # that it is on; it may be an adapter too


@dataclass(frozen=True)
class ModelFolder:
    """One line of it is `str(folder)`."""

    path: str  # hub id or local directory
    config: PreTrainedConfig  # of the model, which for an adapter is the base's
    adapter: Adapter | None = None
    trust_remote_code: bool = False

    @property
    def quantised(self) -> str | None:
        """The method by which the weights on disk are quantised, None for plain ones."""
        about = getattr(self.config, "quantization_config", None)
        if about is None:
            return None
        method = about["quant_method"] if isinstance(about, dict) else about.quant_method
        return str(getattr(method, "value", method))

    @property
    def files(self) -> list[str]:
        """Its own safetensors files."""
        if self.adapter is None:
            return _weight_files(self.path)
        return [_adapter_weights(self.path)]

    def __str__(self) -> str:
        if self.adapter is not None:
            kind, base = self.adapter.config["peft_type"], self.adapter.base
            return f"{self.path}, a {kind} adapter merged into {base}"
        quantised = f", quantised by {self.quantised}" if self.quantised else ""
        return f"{self.path} ({self.config.model_type}{quantised})"


def find_folder(path: str, *, trust_remote_code: bool = False) -> ModelFolder:
    """Look at names and headers, and at no weights.

    Raises InputError for a folder without a model in safetensors, one that is torn or that a wrapped
    model was saved to, and an adapter that can't be merged or whose base is not there.
    """
    return _find(str(path), trust_remote_code, ())


def _find(path: str, trust_remote_code: bool, above: tuple[str, ...]) -> ModelFolder:
    if path in above:
        raise InputError(
            f"can't load a model from {above[0]}: the adapter in {path} is its own base"
        )
    adapter = find_file(path, ADAPTER)
    if adapter is not None:
        about = _read_adapter(path, adapter)
        base = about["base_model_name_or_path"]
        try:
            found = _find(str(base), trust_remote_code, (*above, path))
        except InputError as error:
            raise InputError(f"{path} is an adapter on {base}: {error}") from error
        if found.quantised:
            raise InputError(
                f"{path} is an adapter on {base}, which is quantised by {found.quantised}: it can't "
                "be merged without rounding; expected an adapter on plain weights"
            )
        return ModelFolder(path, found.config, Adapter(about, found), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    _check_files(path, _weight_files(path))
    return ModelFolder(path, config, trust_remote_code=trust_remote_code)


def _read_adapter(path: str, file: str) -> dict:
    refuse = lambda reason: InputError(f"can't load a model from {path}: {reason}")
    try:
        about = json.loads(Path(file).read_text())
        kind, base = about["peft_type"], about["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refuse(f"expected peft's {ADAPTER}, got {_first_line(error)}") from error
    if kind in PROMPTS:
        raise refuse(f"{kind} adapters put tokens or keys before every sequence: not supported")
    if not base:
        raise refuse(f"expected base_model_name_or_path in its {ADAPTER}, got {base}")
    if find_spec("peft") is None:
        raise refuse("an adapter needs peft, which is not installed: pip install peft")
    if any(find_file(path, name) for name in (WEIGHTS, INDEX)):
        raise refuse(
            f"expected a model or an adapter, found both: move {ADAPTER} away, or {WEIGHTS}"
        )
    _check_files(path, [_adapter_weights(path)])
    return about


def find_file(path: str, name: str) -> str | None:
    try:
        return cached_file(path, name)
    except OSError:  # not there, or out of reach; who needs it says so
        return None


def _adapter_weights(path: str) -> str:
    if (weights := find_file(path, ADAPTER_WEIGHTS)) is None:
        raise InputError(
            f"can't load a model from {path}: expected {ADAPTER_WEIGHTS} (others are not read: they "
            "unpickle), found none"
        )
    return weights


def _weight_files(path: str) -> list[str]:
    if (whole := find_file(path, WEIGHTS)) is not None:
        return [whole]
    if (index := find_file(path, INDEX)) is None:
        raise InputError(
            f"can't load a model from {path}: expected {WEIGHTS} or {INDEX} (other files are not "
            "read: they unpickle), found none"
        )
    try:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"{names[0]}, which names no file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"can't load a model from {path}: expected a weight_map in {INDEX}, got "
            f"{_first_line(error)}"
        ) from error
    files = []
    for name in names:
        if (file := find_file(path, name)) is None:
            raise InputError(f"can't load a model from {path}: {name} is missing")
        files.append(file)
    return files


def _check_files(path: str, files: list[str]) -> None:
    """A header vouches for the length of its file; names tell who wrote them."""
    names = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    for mark, wrapper in WRAPPERS.items():
        if wrapped := [name for name in names if mark in name]:
            raise InputError(
                f"can't load a model from {path}: expected the model's own names, got {wrapped[0]}; "
                f"save the model inside {wrapper}, not its wrapper"
            )


def read_model(
    folder: ModelFolder,
    *,
    dtype: torch.dtype = torch.float32,
    quantization_config=None,  # transformers' BitsAndBytesConfig
) -> PreTrainedModel:
    """Every tensor of the model from the folder, adapters merged.

    Raises InputError naming tensors that are missing, of another shape, or nobody's.
    """
    if folder.adapter is not None:
        if quantization_config is not None:
            raise InputError(f"{folder.path} is an adapter, expected plain weights to quantise")
        base = folder.adapter.base
        return _merged(read_model(base, dtype=dtype), folder, base.path)
    loaded: Any  # a pair, with output_loading_info, of which transformers' types say nothing
    try:
        with _without_report():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=dtype,
                quantization_config=quantization_config,
                use_safetensors=True,  # nothing is unpickled
                trust_remote_code=folder.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
    except UNREADABLE as error:
        raise _unreadable(folder.path, error) from error
    model: PreTrainedModel
    found: dict[str, list]
    model, found = loaded
    shapes = [f"{n} {tuple(has)} for {tuple(own)}" for n, has, own in found["mismatched_keys"]]
    # what a quantised checkpoint holds beside the weights is its method's affair
    unexpected = [] if folder.quantised else found["unexpected_keys"]
    _demand(folder.path, model, found["missing_keys"], unexpected, shapes)
    return model


def read_beside(model: PreTrainedModel, folder: ModelFolder) -> PreTrainedModel | None:
    """A second model on the first one's weights, with an adapter of the first's folder in its layers.

    It shares every tensor but the adapter's, so neither may be trained; the adapter is added in
    each pass, and rounds otherwise than a merged one. None for an adapter that does more than add
    to the products of layers, and for one on the embedding or the head: `read_model` merges it.
    Raises InputError as that does.
    """
    if folder.adapter is None or not _adds_alone(folder.adapter.config):
        return None
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    beside = copy.deepcopy(model, tensors)  # modules alone: its memory holds the tensors
    with _can_not(f"be put on {model.name_or_path}", folder):
        _put_on(beside, folder)
    if any(map(is_adapter, _ends(beside))):
        return None
    _name_by(beside.requires_grad_(False), folder)
    return beside.eval()


def _adds_alone(config: dict) -> bool:
    """Whether an adapter is LoRA as its paper has it."""
    more = (
        "use_dora", "use_qalora", "use_bdlora", "modules_to_save", "trainable_token_indices",
        "layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config",
    )  # fmt: skip
    plain = config["peft_type"] == "LORA" and config.get("bias", "none") == "none"
    return plain and not any(config.get(name) for name in more)


def _merged(model: PreTrainedModel, folder: ModelFolder, into: str) -> PreTrainedModel:
    if any(p.is_meta or p.numel() == 0 for p in model.parameters()):
        raise InputError(
            f"{folder.path} is an adapter, and the model is sharded as it is loaded (ZeRO-3, or "
            "fsdp_cpu_ram_efficient_loading): merge it first, on one process, "
            f"sepo.model.load_model('{folder.path}').save_pretrained(...)"
        )
    with _can_not(f"be merged into {into}", folder):
        model = _put_on(model, folder).merge_and_unload(safe_merge=True)
    # which an older peft leaves, as of a model with adapters
    vars(model).pop("peft_config", None)
    return _name_by(model.requires_grad_(True), folder)  # peft froze it


@contextmanager
def _can_not(what: str, folder: ModelFolder) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise InputError(f"{folder.path} can't {what}: {_first_line(error)}") from error


def _put_on(model: PreTrainedModel, folder: ModelFolder) -> Any:  # a PeftModel, around the model
    from peft import PeftConfig, PeftModel

    ties = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    config = PeftConfig.from_pretrained(folder.path)
    config.inference_mode = True
    adapted = PeftModel(model, config)
    if ties and any(map(is_adapter, _ends(model))):
        raise InputError("it changes an embedding that is the head too")
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    found = adapted.load_adapter(
        folder.path, "default", torch_device=str(model.device), key_mapping=mapping
    )
    with safe_open(folder.files[0], framework="pt") as opened:
        names = list(opened.keys())
    whole = [m for m in config.modules_to_save or () if not any(f".{m}." in n for n in names)]
    _demand(folder.path, adapted, [*found.missing_keys, *whole], found.unexpected_keys, [])
    return adapted


def _ends(model: PreTrainedModel) -> tuple:
    return model.get_output_embeddings(), model.get_input_embeddings()


def _name_by(model: PreTrainedModel, folder: ModelFolder) -> PreTrainedModel:
    """Let what is saved of a model, or on top of it, come from its folder and not from the base."""
    model.name_or_path = model.config.name_or_path = folder.path
    vars(model).update(merged_from=folder, merged_values=values_of(model.state_dict()))
    return model


def values_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Of each tensor a number that changes with its values: to see whether something was trained."""
    return {name: int(torch.hash_tensor(tensor).item()) for name, tensor in tensors.items()}


def is_adapter(module) -> bool:
    """Whether peft put it in a module's place."""
    # base_layer in a tuner's layer, the others in its wrappers
    marks = ("base_layer", "original_module", "token_adapter")
    return any(hasattr(module, mark) for mark in marks)


def _demand(path: str, model, missing, unexpected, shapes) -> None:
    parts = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:2])}{', ...' * (len(names) > 2)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        if names
    ]
    if parts:
        raise InputError(
            f"can't load a model from {path}: expected every tensor of {type(model).__name__} and "
            f"no other, got {'; '.join(parts)}"
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers' table of what did not fit; `_demand` says it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")
    keep = lambda record: "LOAD REPORT" not in record.getMessage()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _unreadable(path: str, error: Exception) -> InputError:
    return InputError(f"can't load a model from {path}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
