"""Load a model and its tokenizer from a folder or hub id."""

import torch
from transformers import AutoTokenizer, PreTrainedModel

from sepo import attention
from sepo.errors import InputError
from sepo.model.folder import ADAPTER, ModelFolder, find_file, find_folder, read_model
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
    """A prepared model in eval mode, from safetensors, adapters merged.

    Raises InputError if it can't be loaded whole, as `find_folder` and `read_model` do.
    """
    attention.check_name(attn_impl)  # before minutes of reading
    folder = path
    if not isinstance(path, ModelFolder):
        folder = find_folder(path, trust_remote_code=trust_remote_code)
    model = read_model(folder, dtype=dtype, quantization_config=quantization_config)
    if quantization_config is None and not folder.quantised:
        model = model.to(device)
    return prepare_model(model.eval(), attn_impl=attn_impl)


def load_tokenizer(path: str, *, trust_remote_code: bool = False):
    """The tokenizer saved beside a model, or beside the base of an adapter without one.

    Raises InputError if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        if find_file(path, ADAPTER) is not None:
            base = find_folder(path, trust_remote_code=trust_remote_code).base.path
            return load_tokenizer(base, trust_remote_code=trust_remote_code)
        raise InputError(f"can't load a tokenizer from {path}: {reason}") from error
