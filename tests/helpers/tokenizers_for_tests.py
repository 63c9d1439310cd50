"""Small real tokenizers, built in memory: three families, each with its own way to go wrong."""

import json
from copy import deepcopy
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sepo.data.read.formats import DroppedRow, DropReason, Messages, PlainText
from sepo.data.read.tokenise import Tokenised, tokenise

CORPUS = [
    "<|im_start|>user\nWhat is the name of the river?<|im_end|>\n<|im_start|>assistant\nThe Rhine.",
    "assistant\nHello there, hello again.\nassistant\nThe answer is the river.\n",
    "user\nTell me the answer. user\nTell me more.\nassistant\nHe said that the world is wide.",
    "Human: hello\n\nAssistant: Hello! The answer.\n\nHuman: more\n\nAssistant: The world.",
    "[INST] Tell me [/INST] The river is wide, the answer is the world.",
] * 8

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
# an earlier turn loses its reasoning, a last plain answer gets an empty block
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% elif not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% elif '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def chatml_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges cross the line break before a response; pad is eos; no bos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


@cache
def llama2_tokenizer() -> PreTrainedTokenizerFast:
    """Metaspace, byte fallback, a bos before every text, and a template that trims."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocab = {piece: i for i, piece in enumerate([*first, *pieces])}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=LLAMA2,
    )


@cache
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with NFC and trimmed offsets; no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


# --- rows for them, and what they make of text


def chat(chosen, rejected, *prompt, **options) -> Messages:
    turns = [{"role": "user", "content": text} for text in prompt or ("Tell me",)]
    return Messages(id="7", prompt=turns, chosen=turn(chosen), rejected=turn(rejected), **options)


def turn(content) -> dict:
    return content if isinstance(content, dict) else {"role": "assistant", "content": content}


def plain(prompt, chosen, rejected) -> PlainText:
    return PlainText(id="7", prompt=prompt, chosen=chosen, rejected=rejected)


def one(preference, tokenizer, **options):
    (result,) = tokenise([preference], tokenizer, **options)
    return result


def text_ids(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def kept(preference, tokenizer, **options):
    result = one(preference, tokenizer, **options)
    assert isinstance(result, Tokenised), result
    return result.pair, result.notes


def dropped(preference, tokenizer, **options) -> DropReason:
    result = one(preference, tokenizer, **options)
    assert isinstance(result, DroppedRow) and result.id == "7", result
    return result.why


def with_template(tokenizer, template):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer
