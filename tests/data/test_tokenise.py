"""A row becomes the tokens of prompt and responses, or is dropped with its reason."""

from copy import deepcopy

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_for_tests import (
    THINKING,
    chat,
    chatml_tokenizer,
    dropped,
    kept,
    llama2_tokenizer,
    one,
    plain,
    plain_tokenizer,
    text_ids,
    turn,
    with_template,
)
from transformers import PreTrainedTokenizerFast

from sepo.data.read.formats import DroppedRow, DropReason, TokenIds
from sepo.data.read.tokenise import RowNote, Tokenised, tokenise
from sepo.errors import InputError


def ids(prompt, chosen, rejected, **weights) -> TokenIds:
    return TokenIds(
        id="7",
        prompt=np.array(prompt, np.int32),
        chosen=np.array(chosen, np.int32),
        rejected=np.array(rejected, np.int32),
        **{k: np.array(v, np.float32) for k, v in weights.items()},
    )


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama2"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_prompt_and_response_are_one_tokenisation_of_one_rendering(name, side):
    tokenizer = {"chatml": chatml_tokenizer, "llama2": llama2_tokenizer}[name]()
    row = chat("The river é😀.", "\n\n  Hello there.")
    pair, _ = kept(row, tokenizer)
    turns = [*row.prompt, getattr(row, side)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = [*pair.prompt, *getattr(pair, side)]
    assert whole == text_ids(tokenizer, text)[: len(whole)]
    # all that is left out is what the template writes after the end of the turn
    assert tokenizer.decode(whole) + ("\n" if name == "chatml" else "") == text
    assert pair.chosen.dtype == pair.prompt.dtype == np.int32


def test_the_end_of_turn_belongs_to_the_response_and_what_follows_does_not():
    tokenizer = chatml_tokenizer()
    pair, notes = kept(chat("The river.", "The world."), tokenizer)
    assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id
    assert np.count_nonzero(pair.chosen == tokenizer.eos_token_id) == 1
    assert RowNote.NO_END not in notes


def test_an_end_of_turn_inside_the_content_does_not_end_it():
    tokenizer = chatml_tokenizer()
    pair, _ = kept(chat("one<|im_end|>two", "The world."), tokenizer)
    assert np.count_nonzero(pair.chosen == tokenizer.eos_token_id) == 2
    assert "two<|im_end|>" in tokenizer.decode(pair.chosen)


def test_the_system_turn_that_a_template_adds_is_there_once():
    tokenizer = chatml_tokenizer()
    pair, _ = kept(chat("The river.", "The world."), tokenizer)
    assert tokenizer.decode(pair.prompt).count("system") == 1
    assert "system" not in tokenizer.decode(pair.chosen)


def test_bos_is_there_once():
    tokenizer = llama2_tokenizer()
    pair, _ = kept(chat("The river.", "The world."), tokenizer)
    assert pair.prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in pair.chosen


def test_a_straddling_token_belongs_to_the_response():
    tokenizer = chatml_tokenizer()
    # merges of this tokenizer cross the line break: "assistant\nHello" is one token
    pair, notes = kept(chat("Hello there", "zz"), tokenizer)
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>")
    assert tokenizer.convert_ids_to_tokens(pair.chosen.tolist())[0] == "assistantĊHello"
    # the other response begins at the same row, with its own tokens for the same text
    assert tokenizer.decode(pair.rejected) == "assistant\nzz<|im_end|>"
    assert RowNote.STRADDLE in notes


def test_no_straddling_token_is_not_noted():
    tokenizer = chatml_tokenizer()
    pair, notes = kept(chat("The", "zz"), tokenizer)
    assert RowNote.STRADDLE not in notes
    assert tokenizer.decode(pair.prompt).endswith("assistant\n")


def test_a_template_that_trims_leaves_the_trimmed_response():
    tokenizer = llama2_tokenizer()
    pair, _ = kept(chat("  The river. \n", "zz"), tokenizer)
    assert tokenizer.decode(pair.chosen).strip() == "The river. </s>"


def test_a_response_that_trimming_empties_is_dropped():
    assert dropped(chat("The river.", "\u2003\n"), llama2_tokenizer()) is DropReason.EMPTY


def test_reasoning_where_a_plain_answer_has_an_empty_block():
    tokenizer = chatml_tokenizer(THINKING)
    row = chat("<think>\nhm\n</think>\n\nzz", "yy", "one", "two")
    row.prompt.insert(1, turn("<think>dropped</think>kept"))
    pair, _ = kept(row, tokenizer)
    # what both have in common is the prompt: the empty block is part of one response
    assert tokenizer.decode(pair.prompt).endswith("assistant\n")
    assert tokenizer.decode(pair.chosen) == "<think>\nhm\n</think>\n\nzz<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "<think>\n\n</think>\n\nyy<|im_end|>"
    assert "dropped" not in tokenizer.decode(pair.prompt)
    # both plain: the empty block is the prompt's
    pair, _ = kept(chat("zz", "yy"), tokenizer)
    assert tokenizer.decode(pair.rejected) == "yy<|im_end|>"


def test_a_template_without_an_end_of_turn_is_noted():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = with_template(chatml_tokenizer(), template)
    pair, notes = kept(chat("zz yy", "zz"), tokenizer)
    assert tokenizer.decode(pair.chosen) == "zz yy" and RowNote.NO_END in notes


def test_an_end_of_turn_that_is_no_special_token_is_found():
    tokenizer = deepcopy(chatml_tokenizer())
    tokenizer.add_tokens(["[end]", "\t"])
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\t[end]..' }}{% endfor %}"
    )
    pair, notes = kept(chat("zz", "yy"), with_template(tokenizer, template))
    assert tokenizer.decode(pair.chosen) == "zz\t[end]" and RowNote.NO_END not in notes


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",  # never
        "{{ messages[-1]['content'] + ' ' + messages[-1]['content'] }}",  # twice
        # twice, the first time where an answer is expected
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
)
def test_a_template_that_does_not_show_the_response_once(template):
    tokenizer = with_template(chatml_tokenizer(), template)
    assert dropped(chat("zz", "yy"), tokenizer) is DropReason.REWRITTEN


def test_a_conversation_that_the_template_refuses():
    row = chat("zz", "yy")
    row.prompt.insert(0, {"role": "system", "content": "Be kind."})
    result = one(row, llama2_tokenizer())
    assert (result.why, result.detail) == (DropReason.REFUSED, "only user and assistant turns")
    assert dropped(chat("zz", {"role": "assistant", "content": None}), chatml_tokenizer()) is (
        DropReason.REFUSED
    )


def test_tools_and_other_keys_reach_the_template():
    template = (
        "{{ tools[0]['name'] }}:{% for m in messages %}<|im_start|>{{ m['content'] or '' }}"
        "{{ m['call'] or '' }}<|im_end|>{% endfor %}"
    )
    tokenizer = with_template(chatml_tokenizer(), template)
    call = {"role": "assistant", "content": None, "call": "zap"}
    pair, _ = kept(chat(call, "yy", tools=[{"name": "map"}]), tokenizer)
    assert tokenizer.decode(pair.prompt).startswith("map:<|im_start|>Tell")
    assert tokenizer.decode(pair.chosen) == "zap<|im_end|>"


def test_the_stand_in_may_occur_in_the_data():
    pair, _ = kept(chat("sepo0response", "zz", "sepo0response"), chatml_tokenizer())
    assert chatml_tokenizer().decode(pair.chosen) == "sepo0response<|im_end|>"


@pytest.mark.parametrize(
    ("row", "is_noted"),
    [
        (plain("Tell me more", "Tell me more zz", " yy"), True),
        (plain("Tell", "Tell zz", "Tell yy"), True),
        (plain("Tell", "Tell zz", " yy"), False),  # one short word, by chance
        (chat("Tell me more: zz", "yy", "Tell me more"), True),
        (chat("zz", "yy"), False),
        (ids([1, 2, 3], [1, 2, 3, 4], [5]), True),
        (ids([1], [1, 2], [1, 3]), True),
        (ids([1], [1, 2], [3]), False),
        (ids([1, 2, 3], [1, 2], [3]), False),
    ],
)
def test_a_response_that_begins_with_the_whole_prompt_is_noted(row, is_noted):
    assert (RowNote.REPEATS in kept(row, chatml_tokenizer())[1]) == is_noted


def test_messages_need_a_chat_template():
    with pytest.raises(InputError, match="pair 7: expected a tokenizer with a chat template"):
        one(chat("zz", "yy"), plain_tokenizer())


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InputError, match="expected a fast tokenizer.*got NoneType"):
        one(chat("zz", "yy"), None)


# --- plain text ----------------------------------------------------------------------------------


def test_plain_text_is_one_string_and_an_end_token():
    tokenizer = plain_tokenizer()
    pair, _ = kept(plain("Tell me ", "The river", "zz"), tokenizer)
    whole = [*text_ids(tokenizer, "Tell me The river"), tokenizer.eos_token_id]
    assert [*pair.prompt, *pair.chosen] == whole
    # the blank went into the response's first token
    assert tokenizer.decode(pair.prompt) == "Tell me"
    assert tokenizer.decode(pair.chosen) == " The river<|endoftext|>"
    assert tokenizer.decode(pair.rejected) == " zz<|endoftext|>"


def test_tokens_that_differ_before_the_boundary_are_no_prompt():
    vocab = {t: i for i, t in enumerate(["q", "a", "b", "c", "z", "bc", "ab", "</s>"])}
    bpe = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    pair, notes = kept(plain("qab", "c", "z"), tokenizer)
    named = lambda tokens: tokenizer.convert_ids_to_tokens(tokens.tolist())
    assert named(pair.prompt) == ["q"] and RowNote.STRADDLE in notes
    assert named(pair.chosen) == ["a", "bc", "</s>"]
    assert named(pair.rejected) == ["ab", "z", "</s>"]
    assert dropped(plain("ab", "c", "z"), tokenizer) is DropReason.MERGED  # there is a prompt
    assert dropped(plain("", "c", "z"), tokenizer) is DropReason.NO_PROMPT


def test_the_end_token_is_not_doubled_and_can_be_left_out():
    tokenizer = plain_tokenizer()
    pair, notes = kept(plain("Tell me", " zz<|endoftext|>", " yy"), tokenizer)
    assert tokenizer.decode(pair.chosen) == " zz<|endoftext|>" and RowNote.NO_END not in notes
    pair, notes = kept(plain("Tell me", " zz", " yy"), tokenizer, append_eos=False)
    assert tokenizer.decode(pair.chosen) == " zz" and RowNote.NO_END in notes


@pytest.mark.parametrize("tail", ["", "\n", " \n\n", "\t"])
def test_an_end_token_that_blanks_follow_is_the_end(tail):
    tokenizer = plain_tokenizer()
    pair, notes = kept(plain("Tell me", f" zz<|endoftext|>{tail}", " yy"), tokenizer)
    assert tokenizer.decode(pair.chosen) == " zz<|endoftext|>" and RowNote.NO_END not in notes
    row = plain("<|im_start|>user\nTell<|im_end|>\n", f"zz<|im_end|>{tail}", f"yy<|im_end|>{tail}")
    pair, _ = kept(row, chatml_tokenizer())
    assert chatml_tokenizer().decode(pair.rejected) == "yy<|im_end|>"
    # with more text behind it, it is a part of the response
    pair, _ = kept(plain("Tell me", f" zz<|endoftext|>{tail}a", " yy"), tokenizer)
    assert tokenizer.decode(pair.chosen) == f" zz<|endoftext|>{tail}a<|endoftext|>"
    pair, _ = kept(plain("Tell me", f" zz<|endoftext|>{tail}", " yy"), tokenizer, append_eos=False)
    assert tokenizer.decode(pair.chosen) == f" zz<|endoftext|>{tail}"


def test_the_tokenizers_own_bos_comes_first_and_once():
    tokenizer = llama2_tokenizer()
    for prompt in ("Tell me", "<s>Tell me"):
        pair, _ = kept(plain(prompt, " The river", " zz"), tokenizer)
        assert pair.prompt[0] == tokenizer.bos_token_id
        assert pair.prompt.tolist().count(tokenizer.bos_token_id) == 1
        assert tokenizer.bos_token_id not in pair.chosen
    pair, _ = kept(plain("", "The river", "zz"), tokenizer)
    assert pair.prompt.tolist() == [tokenizer.bos_token_id]


def test_an_empty_prompt_without_bos_is_dropped():
    assert dropped(plain("", "zz", "yy"), plain_tokenizer()) is DropReason.NO_PROMPT


def test_an_end_token_must_exist():
    tokenizer = deepcopy(plain_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="expected a tokenizer with an eos_token"):
        one(plain("Tell me", " zz", " yy"), tokenizer)
    kept(plain("Tell me", " zz", " yy"), tokenizer, append_eos=False)


def test_offsets_that_leave_out_text_are_not_believed():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert dropped(plain("a ", "a x b", "b"), fast) is DropReason.OFFSETS
    kept(plain("a ", "a b", "b"), fast)


# --- lengths -------------------------------------------------------------------------------------


def test_a_cut_response_has_no_end_token_and_is_noted():
    tokenizer = plain_tokenizer()
    row = plain("Tell", " a b c d", " a")
    whole, notes = kept(row, tokenizer)
    assert not {RowNote.CUT_CHOSEN, RowNote.CUT_REJECTED} & set(notes)
    limit = len(whole.prompt) + len(whole.chosen)
    pair, notes = kept(row, tokenizer, max_length=limit)
    assert pair.chosen.tolist() == whole.chosen.tolist() and RowNote.CUT_CHOSEN not in notes
    pair, notes = kept(row, tokenizer, max_length=limit - 1)
    assert pair.chosen.tolist() == whole.chosen.tolist()[:-1]
    assert pair.rejected[-1] == tokenizer.eos_token_id
    assert RowNote.CUT_CHOSEN in notes and RowNote.CUT_REJECTED not in notes


def test_a_prompt_that_fills_max_length_is_dropped():
    assert dropped(ids([1, 2, 3], [4], [5]), None, max_length=3) is DropReason.NO_ROOM
    pair, _ = kept(ids([1, 2, 3], [4, 6], [5]), None, max_length=4)
    assert pair.chosen.tolist() == [4]
    with pytest.raises(InputError, match="expected max_length >= 2, got 1"):
        tokenise([], None, max_length=1)


def test_the_same_response_twice_is_dropped():
    assert dropped(plain("Tell", " zz", " zz"), plain_tokenizer()) is DropReason.SAME
    assert dropped(chat("zz", "zz"), chatml_tokenizer()) is DropReason.SAME
    # different strings, the same tokens
    assert dropped(chat("zz", " zz "), llama2_tokenizer()) is DropReason.SAME
    assert dropped(ids([1], [2, 3], [2, 3]), None) is DropReason.SAME


def test_the_same_once_cut_is_dropped():
    assert dropped(ids([1], [2, 3, 4], [2, 3, 5]), None, max_length=3) is DropReason.SAME_CUT
    kept(ids([1], [2, 3, 4], [2, 3, 5]), None, max_length=4)


def test_a_response_that_begins_with_the_other_is_kept_and_noted():
    for row, tokenizer in (
        (plain("Tell", " a b", " a"), plain_tokenizer()),
        (chat("zz zz", "zz"), chatml_tokenizer()),
        (ids([1], [2], [2, 3]), None),
    ):
        assert RowNote.PREFIX in kept(row, tokenizer)[1]
    assert RowNote.PREFIX not in kept(plain("Tell", " a b", " b"), plain_tokenizer())[1]


# --- token ids -----------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are_and_weights_are_cut_with_them():
    row = ids([1, 2], [3, 4, 5], [6], chosen_weight=[1, 0, 2], rejected_weight=[1])
    pair, notes = kept(row, plain_tokenizer(), max_length=4)
    assert (pair.chosen.tolist(), pair.chosen_weight.tolist()) == ([3, 4], [1, 0])
    assert pair.rejected.tolist() == [6] and notes == (RowNote.CUT_CHOSEN,)


def test_weights_that_the_cut_leaves_without_a_token():
    row = ids([1, 2], [3, 4, 5], [6], chosen_weight=[0, 0, 2])
    assert dropped(row, None, max_length=4) is DropReason.ZERO_WEIGHT


def test_token_ids_outside_the_vocabulary():
    size = len(plain_tokenizer())
    with pytest.raises(InputError, match=f"pair 7: expected token ids below {size}.*got {size}"):
        one(ids([1], [size], [2]), plain_tokenizer())


def test_kinds_may_be_mixed_and_keep_their_order():
    rows = [plain("Tell", " a", " b"), ids([1], [2], [3]), chat("a", "a"), plain("T", " c", " d")]
    results = tokenise(rows, chatml_tokenizer())
    assert [type(r) for r in results] == [Tokenised, Tokenised, DroppedRow, Tokenised]
    assert chatml_tokenizer().decode(results[3].pair.chosen) == " c<|im_end|>"
