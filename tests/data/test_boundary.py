"""Where the prompt ends and the response begins, for any text at all."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import (
    chat,
    chatml_tokenizer,
    llama2_tokenizer,
    one,
    plain,
    plain_tokenizer,
    text_ids,
)

from sepo.data.read.formats import DroppedRow, DropReason

# pieces that merge across the boundary, that byte-level BPE splits, that trimming eats
PIECES = ["\n", " ", "Hello", "The river", "é", "e\u0301", "😀", "\u3000", "a", "\u200d", "[/INST]"]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=6).map("".join)


def unaltered(tokenizer, text: str) -> bool:
    """Whether the tokenizer keeps this text: an unknown or normalised character is its own loss."""
    return tokenizer.decode(text_ids(tokenizer, text)) == text


@settings(max_examples=150, deadline=None)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_chatml_boundary_is_exact_for_any_text(prompt, chosen, rejected):
    tokenizer = chatml_tokenizer()
    result = one(chat(chosen, rejected, prompt), tokenizer)
    if isinstance(result, DroppedRow):
        assert result.why in ((DropReason.SAME,) if chosen == rejected else (DropReason.EMPTY,))
        assert result.why is DropReason.SAME or not (chosen and rejected)
        return
    pair, head = result.pair, "assistant\n"
    for response, tokens in ((chosen, pair.chosen), (rejected, pair.rejected)):
        before = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        whole = [*pair.prompt, *tokens]
        assert whole == text_ids(tokenizer, before + response + "<|im_end|>\n")[: len(whole)]
        assert tokenizer.decode(whole) == before + response + "<|im_end|>"
        # no character of the response in the prompt, and of the prompt's head at most one token
        assert before.startswith(tokenizer.decode(pair.prompt).rstrip("\ufffd"))
        assert tokenizer.decode(tokens) in (response + "<|im_end|>", head + response + "<|im_end|>")


@settings(max_examples=100, deadline=None)
@given(prompt=texts, chosen=texts, rejected=texts)
def test_llama2_boundary_is_exact_for_any_text(prompt, chosen, rejected):
    tokenizer = llama2_tokenizer()
    result = one(chat(chosen, rejected, prompt), tokenizer)
    same = chosen.strip() == rejected.strip()
    if isinstance(result, DroppedRow):
        assert result.why in (DropReason.SAME, DropReason.EMPTY)
        assert same or not (chosen.strip() and rejected.strip())
        return
    pair = result.pair
    before = f"<s>[INST] {prompt.strip()} [/INST] "
    for response, tokens in ((chosen, pair.chosen), (rejected, pair.rejected)):
        whole = [*pair.prompt, *tokens]
        assert whole == text_ids(tokenizer, f"{before}{response.strip()} </s>")
        assert response.strip() in tokenizer.decode(whole)
        assert before.startswith(tokenizer.decode(pair.prompt).rstrip("\ufffd"))


@settings(max_examples=150, deadline=None)
@given(
    prompt=texts, chosen=texts, rejected=texts, name=st.sampled_from(["chatml", "plain", "llama2"])
)
def test_plain_boundary_is_exact_for_any_text(prompt, chosen, rejected, name):
    tokenizer = {"chatml": chatml_tokenizer, "plain": plain_tokenizer, "llama2": llama2_tokenizer}[
        name
    ]()
    result = one(plain(prompt, chosen, rejected), tokenizer)
    if isinstance(result, DroppedRow):
        assert result.why in (
            DropReason.SAME,
            DropReason.EMPTY,
            DropReason.NO_PROMPT,
            DropReason.MERGED,
        )
        assert (result.why is DropReason.NO_PROMPT) <= (not prompt) and (
            result.why is DropReason.MERGED
        ) <= bool(prompt)
        return
    pair = result.pair
    start = 1 if name == "llama2" else 0
    for response, tokens in ((chosen, pair.chosen), (rejected, pair.rejected)):
        whole = [*pair.prompt[start:], *tokens]
        assert whole == [*text_ids(tokenizer, prompt + response), tokenizer.eos_token_id]
        if unaltered(tokenizer, prompt + response) and unaltered(tokenizer, prompt):
            end = tokenizer.eos_token
            assert tokenizer.decode(tokens).lstrip().endswith((response + end).lstrip())
