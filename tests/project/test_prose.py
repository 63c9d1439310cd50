"""Prose that a newcomer can read: the counting, and the pages that are held to it."""

from pathlib import Path

import pytest

from tools import prose

ROOT = Path(__file__).parents[2]
PAGES = list(prose.markdown())


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("One two three. Four five.", [3, 2]),
        ("Some of it, e.g. this one, stays. Gone.", [7, 1]),
        ("It took 1.5 s (0.9 before). Then 3.0.", [6, 2]),
        ("Call `ops.pack(x). Then` twice. `sepo.ops` needs torch.", [3, 3]),
        ("Other pairs, scores, ... are refused. ... The end.", [5, 2]),
        ("He said “no.” And left", [3, 2]),
        ('See [the page](docs/a.md "Its title. More") first.', [4]),
        ("A line\nthat goes on — here.\n\nAnother paragraph without a stop", [6, 5]),
        ("- first item\n- **Label.** second item here\n  goes on\n1. third", [2, 5, 1]),
        ("> A quoted line\n> goes on.", [3, 2]),
    ],
)
def test_sentences_are_split_where_a_reader_ends_them(text, counts):
    assert [prose.words(one) for one in prose.read(text).sentences] == counts


@pytest.mark.parametrize(
    "text",
    [
        "# A heading. With a stop\n",
        "| a cell. | another. |\n|---|---|\n",
        "```\nsome code. more code\n\nand more\n```\n",
        "<!-- a comment.\nof two lines. -->\n",
        ">>> code(). more()\n",
        "![A picture. With a cell](a.svg)\n",
    ],
)
def test_what_is_no_prose_is_not_counted(text):
    wide = text.replace("code", "code" * 40).replace("cell", "cell" * 40)
    assert prose.read(wide) == prose.Prose([], [])
    assert len(prose.read(wide + "\nA sentence.\n").sentences) == 1


def test_wide_lines_are_numbered_and_a_lone_link_may_be_wide():
    link = f"[a page](https://example.org/{'x' * 100})"
    text = f"Short.\n\n```\n{'x' * 101}\n```\n{'word ' * 21}\n- {link}\nsee {link}\n{'y' * 100}\n"
    assert prose.read(f"{text}# {'z' * 99}\n| {'a cell ' * 20} |\n").wide == [6, 8, 10]


def test_bounds(tmp_path, capsys):
    page = tmp_path / "page.md"
    for text, code in (
        ("Ten words are fine. " * 20, 0),
        ("word " * 15 + ".\n", 0),
        ("word " * 8 + "\n" + "word " * 8 + ".\n", 1),  # a mean of 16
        ("Short.\n" * 18 + ("word " * 16 + "\n") * 2, 1),  # one of 19 has 32
        ("Short.\n" * 19 + ("word " * 16 + "\n") * 2, 0),  # one of 20
    ):
        page.write_text(text.replace(" .", ".").replace(". ", ".\n"))
        assert prose.main([str(page)]) == code, text
        assert ("beyond" in capsys.readouterr().out) == bool(code)


def test_docstrings_are_found(tmp_path):
    (tmp_path / "a.py").write_text('"""One."""\n\n\nclass A:\n    """What two."""\n\n    x = 1\n')
    (tmp_path / "b.py").write_text(
        'def f():\n    """Three.\n\n    Args:\n        x: four.\n    """\n'
    )
    texts = prose.docstrings(tmp_path)
    assert texts[:2] == ["One.", "What two."]
    assert prose.read(texts[2]).sentences == ["Three.", "Args:", "x: four."]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_plain(page):
    read = prose.read(page.read_text())
    assert read.mean <= prose.MEAN and read.share <= prose.SHARE, read.long
    assert read.wide == []


@pytest.mark.parametrize("package", ["python/sepo", "sepo_kernels"])
def test_docstrings_begin_with_a_verb(package):
    assert [text for text in prose.docstrings(ROOT / package) if text.startswith("What")] == []
