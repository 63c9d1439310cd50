"""Load a model and its tokenizer from a folder or hub id."""

from collections.abc import Callable
from functools import wraps
from types import MethodType

import torch
from transformers import AutoTokenizer, PreTrainedModel

from sepo import attention
from sepo.errors import InputError
from sepo.model.base import base_of
from sepo.model.folder import ADAPTER, ModelFolder, find_file, find_folder, read_model
from sepo.model.forward import restore_attention
from sepo.model.prepare import prepare_model


def load_model(
    path: str | ModelFolder,  # hub id or local directory, or what find_folder said of it
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_impl: str = "auto",  # or a name of attention.IMPLS
    quantization_config=None,  # transformers' BitsAndBytesConfig; then it chooses the device
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model in eval mode, from safetensors, adapters merged; its first batch prepares it.

    It is prepared where it is by then, so move it first. Training and scoring prepare a model
    themselves, before anything expensive. Raises InputError if it can't be loaded whole, as
    `find_folder` and `read_model` do.
    """
    attention.check_name(attn_impl)  # before minutes of reading
    if isinstance(path, ModelFolder):
        folder = path
    else:
        folder = find_folder(path, trust_remote_code=trust_remote_code)
    model = base_of(read_model(folder, dtype=dtype, quantization_config=quantization_config))
    if quantization_config is None and not folder.quantised:
        model.to(device)  # type: ignore[arg-type]  # transformers' wraps() loses `self`
    model.packed_attn_impl = attn_impl
    model.forward = MethodType(_preparing_forward(type(model)), model)
    return model.eval()


def _preparing_forward(cls: type[PreTrainedModel]) -> Callable:
    @wraps(cls.forward)
    def forward(self, *args, batch=None, **kwargs):
        if batch is None:
            restore_attention(self)
            return type(self).forward(self, *args, **kwargs)
        return prepare_model(self).forward(*args, batch=batch, **kwargs)  # another one from now on

    return forward


def load_tokenizer(path: str, *, trust_remote_code: bool = False):
    """The tokenizer saved beside a model, or beside the base of an adapter without one.

    Raises InputError if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        if find_file(path, ADAPTER) is not None:
            adapter = find_folder(path, trust_remote_code=trust_remote_code).adapter
            if adapter is not None:
                return load_tokenizer(adapter.base.path, trust_remote_code=trust_remote_code)
        raise InputError(f"can't load a tokenizer from {path}: {reason}") from error
