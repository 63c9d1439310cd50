"""The page in a real browser: what a reader sees, types and presses."""

import re
from dataclasses import replace

import numpy as np
import pytest
from reports import BROWSER, HOSTILE, browse, drive, ids, scored, write_metrics, write_store
from tokenizers_for_tests import chatml_tokenizer

from sepo.report import collect, render_page

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

TEXTS = ("The river is wide: 12 bridges, 345 boats, and 6789 swans.", "Quick brown foxes jump.")
# what the tests below look at, after doing as a reader would
DRIVER = """
const seen = {};
const shown = () => [...document.querySelectorAll(".pair h3")].map((h) => h.textContent);
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const underlined = () => [...document.querySelectorAll(".response")[0].querySelectorAll(".t")]
  .filter((t) => getComputedStyle(t).textDecorationLine === "underline").length;
seen.width = innerWidth;
seen.overflow = [...document.body.querySelectorAll("*")].filter((e) =>
  !e.closest(".scroll, .skip, .unseen") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 80));
seen.scrolled = [...document.querySelectorAll(".scroll")].filter((e) =>
  e.scrollWidth > e.clientWidth + 1).map((e) => e.getAttribute("aria-label"));
seen.first = shown();
seen.marks = [underlined()];
for (const k of ["0", "2"]) { document.querySelector(`[name=k][value="${k}"]`).click(); seen.marks.push(underlined()); }
seen.selected = document.querySelectorAll(".response")[0].querySelectorAll("[aria-selected=true]").length;
const inside = [...document.querySelectorAll(".response")[0].children];
const cut = inside.findIndex((e) => e.matches(".cut") && getComputedStyle(e).display !== "none");
seen.kept = inside.slice(0, cut).filter((e) => e.matches(".t")).length;
seen.faint = inside.filter((e) => getComputedStyle(e).color ===
  getComputedStyle(document.querySelector("footer")).color && e.matches(".t")).length;
document.querySelector('[data-by="1"]').click();
seen.second = shown();
const stops = document.querySelectorAll(".response")[0].querySelectorAll('[tabindex="0"]');
seen.stops = stops.length;
stops[0].focus();
press("ArrowRight");
press("ArrowRight");
seen.focused = document.activeElement.getAttribute("aria-label");
seen.told = document.getElementById("token").hidden ? null : document.getElementById("token").textContent;
press("End");
seen.end = document.activeElement.nextElementSibling === null;
const field = document.querySelector("[name=text]");
field.value = "NEEDLE";
field.dispatchEvent(new Event("input", { bubbles: true }));
setTimeout(() => {
  seen.filtered = shown();
  seen.count = document.getElementById("count").textContent;
  seen.hash = location.hash;
  parent.postMessage(JSON.stringify(seen), "*");
}, 1000);
"""


def falling(pair):
    """The scores of the chosen response fall, so what is selected and kept is its beginning."""
    return replace(pair, chosen_score=np.linspace(1, -1, len(pair.chosen), dtype=np.float32))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page")
    pairs = [
        scored(f"row-{i}", "Tell me", TEXTS[i % 2], TEXTS[1 - i % 2], seed=i) for i in range(25)
    ]
    pairs[0] = falling(pairs[0])
    pairs[3] = scored("row-3", HOSTILE, f"so {HOSTILE} it is \u202e reversed", "hello", seed=3)
    pairs[17] = scored("row-17", "Tell me", "the river", "has a needle in it 😀", seed=17)
    store = write_store(path / ("a-store-with-a-long-name-" * 3), pairs, oracle_name="o" * 90)
    run = write_metrics(path / "run", *(f'{{"step": {i}, "loss": {2 / i}}}' for i in (1, 2, 3)))
    return render_page(collect([store], [chatml_tokenizer()], [run]))


@pytest.mark.parametrize("width", [1280, 420])
def test_a_reader_finds_the_way(page, tmp_path, width):
    found, console = drive(page, tmp_path, DRIVER, width=width)
    assert console == []
    assert found["width"] == width and found["overflow"] == [] and found["scrolled"] == []
    assert found["first"] == [f"Row row-{i}" for i in range(10)]
    assert found["second"] == [f"Row row-{i}" for i in range(10, 20)]
    at_30, at_10, at_50 = found["marks"]
    assert 0 < at_10 < at_30 < at_50 == found["selected"]
    count = len(ids(TEXTS[0]))
    assert (at_10, at_30, at_50) == (count // 10, 3 * count // 10, count // 2)
    assert (found["kept"], found["faint"]) == (count // 2, count - count // 2)
    assert found["stops"] == 1 and found["end"]
    assert re.fullmatch(r".+: [+−][\d.e-]+ nats, token 3 of \d+.*", found["focused"])
    assert found["focused"].endswith(found["told"])
    assert found["filtered"] == ["Row row-17"] and found["count"] == "1–1 of 1 pairs, filtered"
    assert "text=NEEDLE" in found["hash"] and "k=50" in found["hash"]


def test_a_link_opens_what_it_names_and_text_stays_text(page, tmp_path):
    dom, console = browse(page, tmp_path, at="#text=onerror&k=10")
    assert console == []
    assert re.findall(r"<h3>Row ([^<]*)</h3>", dom) == ["row-3"]
    assert 'data-k="0"' in dom and "<img" not in dom
    box = re.search(r'<div class="response".*?</div>', dom, re.DOTALL)[0]
    said = re.sub(r"<[^>]*>", "", box).replace("&lt;", "<").replace("&gt;", ">")
    assert f"so {HOSTILE} it is" in said and r"\u{202e}" in said and "\u202e" not in said


def test_the_console_would_tell(page, tmp_path):
    """The two above would see a page that lets markup in, or breaks."""
    _, console = browse(page.replace("<main", f"{HOSTILE}<main"), tmp_path)
    assert any("onerror" in line or "script-src" in line or "img-src" in line for line in console)
    _, console = browse("<script>throw Error('x')</script>", tmp_path)
    assert console
