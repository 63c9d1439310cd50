import pytest
from model_folders import untied
from tiny import tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    untied().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"
