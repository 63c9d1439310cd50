"""Small scored stores whose tokens are text, and a browser to read the page with."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from manifests import manifest
from tokenizers_for_tests import chatml_tokenizer, text_ids

from sepo.data import ScoredPair
from sepo.data.store.store import StoreWriter, pairs_hash, template_hash, tokenizer_hash

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HOSTILE = "</script><img src=x onerror=console.error(1)>"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def ids(text: str, tokenizer=None) -> np.ndarray:
    return np.array(text_ids(tokenizer or chatml_tokenizer(), text), np.int32)


def scored(id="r", prompt="Tell me", chosen="The river.", rejected="more world", *, seed=0, **own):
    """A pair of texts with random scores, or a field's own values."""
    rng = np.random.default_rng(seed)
    tokens = {"prompt": ids(prompt), "chosen": ids(chosen), "rejected": ids(rejected)}
    draw = lambda side: rng.normal(0.02, 0.2, len(tokens[side])).astype(np.float32)
    scores = {f"{side}_score": draw(side) for side in ("chosen", "rejected")}
    return ScoredPair(id=id, **{**tokens, **scores, **own})


def write_store(path: Path, pairs: list[ScoredPair], tokenizer=None, **entries) -> Path:
    tokenizer = tokenizer or chatml_tokenizer()
    writer = StoreWriter(
        path,
        manifest(
            tokenizer=tokenizer_hash(tokenizer),
            chat_template=template_hash(tokenizer),
            source=pairs_hash(pairs),
            pairs=len(pairs),
            **{"pairs_per_part": 7, **entries},
        ),
    )
    for part in writer.missing():
        writer.write(part, [pairs[i] for i in writer.pairs_of(part)])
    writer.finish()
    return path


def write_metrics(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def browse(page: str, folder: Path, *, at="") -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what they wrote to the console."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{file}{at}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drive(page: str, folder: Path, script: str, *, width: int) -> tuple[dict, list[str]]:
    """What `script` told its `parent` from within the page, this wide; and the console."""
    # a driver is what the page's policy forbids
    driven = POLICY.sub("", page).replace("</body>", f"<script>{script}</script></body>")
    (folder / "driven.html").write_text(driven, encoding="utf-8")
    # a frame, because no window is narrower than 500 pixels
    frame = f"""<!DOCTYPE html><iframe src="driven.html" width="{width}" height="900"
        style="border: 0"></iframe><script>
        addEventListener("message", (event) => {{ document.body.textContent = event.data; }});
        </script>"""
    dom, console = browse(frame, folder)
    return json.loads(html.unescape(re.search(r"<body>(.*?)</body>", dom, re.DOTALL)[1])), console


VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Every element with its attributes and its own text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [(a, "".join(text)) for name, a, text in self.elements if name == tag]
