"""Count how plain the prose is: words a sentence, sentences over 30 words, lines over 100 columns.

    python tools/prose.py                    # all Markdown of the project, and its docstrings
    python tools/prose.py LOG.md --long      # one file, and what in it is too long

Inline code is one word; a link is its text. Headings, tables, pictures, fenced code, comments, and
bold labels at the start of a paragraph or an item, are no sentences. Tables, code, pictures and
lines that are one link may be wide. Exit code 1 where a Markdown file is beyond the bounds;
docstrings are counted only.
"""

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("python/sepo", "sepo_kernels")
NOT_OURS = {"runs", "shared", "build", "dist"}  # and what begins with a dot
MEAN, SHARE, LONG, WIDTH = 15, 0.05, 30, 100

UNREAD = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$|<!--.*?-->", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r"\s*(?:[-*+]|\d+\.|>)\s+")
ARGUMENT = re.compile(r"\s+[`*\w., ]+: ")  # "    x: (M, D), ..." below a docstring's "Args:"
CODE = re.compile(r"(`+).+?\1")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
LABEL = re.compile(r"\*\*[^*]+(?:[.:]\*\*|\*\*:)")
LINK_ONLY = re.compile(r"(?:\[[^\]]*\]\(\S*\)|\[[^\]]*\]:\s*\S+|<?https?://\S+)[.,;:]?")
END = re.compile(r"[.!?][\"'’”)\]*_]*(?=\s)")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|cf|et al|etc|approx|Fig|Eq|Sec|No)\.$")


@dataclass
class Prose:
    """The sentences of a page, and the numbers of its lines over 100 columns."""

    sentences: list[str]
    wide: list[int]

    @property
    def mean(self) -> float:
        return sum(map(words, self.sentences)) / max(len(self.sentences), 1)

    @property
    def long(self) -> list[str]:
        return [one for one in self.sentences if words(one) > LONG]

    @property
    def share(self) -> float:
        return len(self.long) / max(len(self.sentences), 1)

    @property
    def within(self) -> bool:
        return self.mean <= MEAN and self.share <= SHARE and not self.wide


def words(sentence: str) -> int:
    """Count what has a letter or a digit: "10.5 x 3 — yes" has four words."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def split(paragraph: str) -> list[str]:
    """Split after ". ", but not after "e.g.", nor at "..." before a small letter."""
    text = CODE.sub("code", re.sub(rf"^{LABEL.pattern}", "", paragraph))
    text = LINK.sub(r"\1", text)
    sentences, start = [], 0
    for end in END.finditer(text):
        sentence, rest = text[start : end.end()], text[end.end() :].lstrip()
        pause = sentence.endswith("...") and rest[:1].islower()
        if not pause and not ABBREVIATION.search(sentence):
            sentences.append(sentence.strip())
            start = end.end()
    return [one for one in (*sentences, text[start:].strip()) if words(one)]


def read(text: str) -> Prose:
    """Read Markdown or a docstring: its sentences, and which of its lines are too wide."""
    text = UNREAD.sub(lambda found: "\n" * found[0].count("\n"), text)
    paragraphs, wide = [""], []
    for number, line in enumerate(text.splitlines(), 1):
        item = ITEM.match(line)
        bare = line[item.end() if item else 0 :].strip()
        no_prose = bare.startswith(("|", ">>>", "!["))
        if len(line) > WIDTH and not no_prose and not LINK_ONLY.fullmatch(bare):
            wide.append(number)
        if not bare or no_prose or bare.startswith("#"):
            paragraphs.append("")
            continue
        if item or ARGUMENT.match(line):
            paragraphs.append("")
        paragraphs[-1] = f"{paragraphs[-1]} {bare}".strip()
    return Prose([one for paragraph in paragraphs for one in split(paragraph)], wide)


def docstrings(folder: Path) -> list[str]:
    """Read the docstrings of every module, class and function under `folder`."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    trees = [ast.parse(file.read_text()) for file in sorted(folder.rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def markdown(root: Path = ROOT) -> list[Path]:
    """Find the project's own Markdown files."""
    files = [(file, file.relative_to(root).parts) for file in sorted(root.rglob("*.md"))]
    return [f for f, parts in files if not any(p in NOT_OURS or p[0] == "." for p in parts)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="Markdown; none: all, and docstrings")
    parser.add_argument("--long", action="store_true", help="print what is too long, too")
    args = parser.parse_args(argv)
    pages = {file: read(file.read_text()) for file in args.files or markdown()}

    print(f"{'':42}sentences   mean  over {LONG} words  over {WIDTH} columns")
    for file, page in pages.items():
        counts = f"{len(page.sentences):9} {page.mean:6.1f} {page.share:14.1%} {len(page.wide):17}"
        name = str(file).removeprefix(f"{ROOT}/")
        print(f"{name:42}{counts}{'' if page.within else '  beyond'}")
        if args.long:
            print(*(f"    over {WIDTH} columns: line {number}" for number in page.wide), sep="\n")
            print(*(f"    {words(one)} words: {one}" for one in page.long), sep="\n")
    for package in () if args.files else PACKAGES:
        texts = docstrings(ROOT / package)
        page = Prose([one for text in texts for one in read(text).sentences], [])
        what = sum(text.startswith("What") for text in texts)
        counts = f"{len(page.sentences):9} {page.mean:6.1f} {page.share:14.1%}"
        print(
            f"{package + ', ' + str(len(texts)) + ' docstrings':42}{counts}  {what} begin with What"
        )
    return 0 if all(page.within for page in pages.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
