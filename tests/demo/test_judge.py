from sepo.demo.judge import lexicon_tokens, lexicon_words, sentiment


def test_sentiment_has_the_right_sign():
    assert sentiment(" a wonderful film, and I love it") > 0.5
    assert sentiment(" a terrible film, and I hate it") < -0.5
    assert sentiment(" a film of ninety minutes") == 0


def test_words_are_found_whatever_their_case_and_punctuation():
    text = "It was GREAT; 'bad'! (Love) it... bakers' well-made 2good"
    assert [text[start:end] for start, end in lexicon_words(text)] == ["GREAT", "bad", "Love"]


def test_every_token_of_a_word_counts_and_no_other():
    text = " a wonderful film"
    offsets = [(0, 2), (2, 8), (8, 12), (12, 17)]  # " a", " wonde", "rful", " film"
    assert lexicon_tokens(text, offsets) == [False, True, True, False]


def test_the_space_before_a_word_is_not_the_word():
    assert lexicon_tokens("so good", [(0, 2), (2, 3), (3, 7)]) == [False, False, True]
