"""A tokenizer of single characters for the tiny models: 61 ids, `<|endoftext|>` is 0, end 1."""

from string import ascii_letters

from tiny import V
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<|endoftext|>", "<end>", *ascii_letters, *" .,'-!?"]
    assert len(symbols) == V
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<end>"
    )
