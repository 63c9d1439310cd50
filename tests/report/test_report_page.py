"""The file itself: what it holds, what it lets in, whether its colours can be read."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from reports import HOSTILE, Page, scored, write_metrics, write_store
from tokenizers_for_tests import chatml_tokenizer

from sepo.report import collect, render_page
from sepo.report.charts import Chart, Series, run_charts, short_names, store_charts, table
from sepo.report.figures import draw, tick_text, ticks
from sepo.report.html import encode_score


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Collected data with markup wherever text can come from."""
    path = tmp_path_factory.mktemp("hostile")
    pair = scored(f"id {HOSTILE}", f"prompt {HOSTILE}", f"chosen {HOSTILE}", f"rejected {HOSTILE}")
    about = {f"{role}_name": f"{role} {HOSTILE}" for role in ("oracle", "reference")}
    about |= {"tokenizer_name": HOSTILE, "reading": {"source": HOSTILE, "dropped": {HOSTILE: 2}}}
    store = write_store(path / "store <b>", [pair] * 3, **about)
    run = write_metrics(
        path / "run <i>", *(f'{{"step": {i}, "loss": {2 / i}, "<u>": 1}}' for i in (1, 2, 3))
    )
    return collect([store] * 2, [chatml_tokenizer()] * 2, [run, run])


@pytest.fixture(scope="module")
def text(hostile):
    return render_page(hostile)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_text_from_the_data_is_never_markup(page, text):
    assert HOSTILE not in text
    assert not page.all("img") and not page.all("b") and not page.all("i") and not page.all("u")
    assert len(page.all("script")) == 2
    assert any(HOSTILE in said for _, said in page.all("td"))
    assert any("run <i>" in said for _, said in page.all("li"))


def test_the_responses_in_the_page_are_the_collected_ones(page, hostile):
    data = json.loads(page.all("script")[0][1])
    assert data["strings"] == hostile["strings"]
    for shown, collected in zip(data["pairs"], hostile["pairs"], strict=True):
        assert (shown["id"], shown["prompt"]) == (collected["id"], collected["prompt"])
        for a, b in zip(shown["responses"], collected["responses"], strict=True):
            for side in ("chosen", "rejected"):
                tokens = np.frombuffer(base64.b64decode(a[side]["tokens"]), "<u2")
                codes = np.frombuffer(base64.b64decode(a[side]["score"]), "<u2")
                assert tokens.tolist() == b[side]["tokens"]
                assert [decode(int(c)) for c in codes] == b[side]["score"]
                assert a[side]["level"] == b[side]["level"]


def test_a_large_table_of_strings_takes_four_bytes_a_token(hostile):
    many = {**hostile, "strings": hostile["strings"] + ["x"] * (1 << 16)}
    data = json.loads(Page(render_page(many)).all("script")[0][1])
    tokens = base64.b64decode(data["pairs"][0]["responses"][0]["chosen"]["tokens"])
    expected = hostile["pairs"][0]["responses"][0]["chosen"]["tokens"]
    assert data["bytes"] == 4 and np.frombuffer(tokens, "<u4").tolist() == expected


def test_scores_keep_three_significant_digits():
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 10, 3000) * 10.0 ** rng.integers(-12, 4, 3000)
    values *= rng.choice([-1, 1], 3000)
    values = np.concatenate([values, [0, 0.9996, -0.00099951, 9.995, 100, -1e-12]])
    assert [decode(int(c)) for c in encode_score(values)] == [float(f"{v:.3g}") for v in values]
    assert encode_score(np.array([1e-30, 1e30, np.inf])).tolist() == [0, 0, 0]


def test_nothing_is_loaded_and_only_these_scripts_run(page, text):
    (policy,) = [a for a, _ in page.all("meta") if "http-equiv" in a]
    style, script = page.all("style")[0][1], page.all("script")[1][1]
    digest = lambda s: base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()
    assert "default-src 'none'" in policy["content"]
    assert f"script-src 'sha256-{digest(script)}'" in policy["content"]
    assert f"style-src 'sha256-{digest(style)}'" in policy["content"]
    for tag, attributes, _ in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#"), tag
    assert "http://" not in text and "https://" not in text


def test_every_figure_says_in_words_what_it_shows(page):
    titles, texts = page.all("title")[1:], page.all("desc")
    figures = [a for a, _ in page.all("svg") if "aria-hidden" not in a]
    assert len(figures) == len(titles) == len(texts) == len(page.all("figure")) == 4 * 2 + 1
    for svg, (title, name), (text, said) in zip(figures, titles, texts, strict=True):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"].split() == [title["id"], text["id"]]
        assert len(name) > 3 and len(said) > 20
    identifiers = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))


def test_links_lead_somewhere(page):
    identifiers = {a["id"] for _, a, _ in page.elements if "id" in a}
    assert {a["href"][1:] for a, _ in page.all("a")} <= identifiers


def test_figures_say_the_numbers(tmp_path):
    score = np.array([8, 0, -1, 1, 0, 0, 0, 1, 0, 0], np.float32)  # 80 % of the mass in one of ten
    pair = scored(chosen="abcdefghij", chosen_score=score, rejected="x")
    store = write_store(tmp_path / "s", [pair])
    data = collect([store], [chatml_tokenizer()])
    charts = {chart.key: chart for chart in store_charts(data)}
    assert "Chosen: 10\u00a0% of the tokens hold 80\u00a0%" in charts["accumulation-0"].text
    # 30 %: tokens 0, 3 and 7 of ten
    assert "kept 10\u00a0% at k = 10\u00a0%, 80\u00a0% at k = 30\u00a0%" in charts["lengths-0"].text
    head, rows = table(charts["accumulation-0"])
    assert head[1] == "chosen: positive scores"
    assert [row[:2] for row in rows[:3]] == [["10", "80"], ["20", "90"], ["30", "100"]]
    assert "10\u00a0%" in render_page(data)


def test_runs_alone_make_a_page(tmp_path):
    lines = [f'{{"step": {i}, "loss": {4 - i}, "rewards/chosen": {i}}}' for i in (1, 2, 3)]
    data = collect(runs=[write_metrics(tmp_path / "r", *lines)])
    page = Page(render_page(data))
    assert [chart.title for chart in run_charts(data["runs"])] == ["Loss", "Rewards"]
    assert "loss 3 at step 1, 1 at step 3." in [text for _, text in page.all("desc")]
    assert not page.all("script") and "3 steps" in page.all("li")[0][1]


def test_runs_share_a_figure_and_missing_values_are_gaps(tmp_path):
    a = write_metrics(tmp_path / "a", *(f'{{"step": {i}, "loss": {i}}}' for i in (1, 2)))
    b = write_metrics(
        tmp_path / "b", *(f'{{"step": {i}, "loss": {v}}}' for i, v in ((1, 9), (2, "NaN"), (3, 7)))
    )
    (chart,) = run_charts(collect(runs=[a, b])["runs"])
    assert [series.name for series in chart.series] == ["a: loss", "b: loss"]
    assert [series.colour for series in chart.series] == [0, 1]
    assert chart.series[1].y == [9, None, 7]
    assert re.findall(r' d="([^"]+)"', draw(chart))[1].count("M") == 2


def test_axes():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(-0.3, 0.31) == pytest.approx([-0.2, 0, 0.2], abs=1e-12)
    assert [tick_text(v) for v in (0, -0.2, 0.1 + 0.2, 2e-5)] == ["0", "−0.2", "0.3", "2e-05"]
    flat = Chart("k", "t", "s", "words", "x", "y", (Series("n", [3], [5]),))
    assert "nan" not in draw(flat) and 'class="dot s0 d0"' in draw(flat)


def test_short_names():
    assert short_names(["runs/a/store", "runs/b/store"]) == ["a/store", "b/store"]
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names([]) == [] and short_names(["x", "x"]) == ["x", "x"]


def test_text_stands_out_from_what_is_behind_it(page):
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for lines, in the light and in the dark."""
    blocks = re.findall(r":root \{(.*?)\}", page.all("style")[0][1], re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", block))
        for behind in (
            "paper",
            "panel",
            *(f"{sign}{step}" for sign in "pn" for step in range(1, 6)),
        ):
            assert contrast(colours["ink"], colours[behind]) >= 4.5, behind
        for front in ("soft", "link"):
            for behind in ("paper", "panel"):
                assert contrast(colours[front], colours[behind]) >= 4.5, (front, behind)
        for line in range(6):
            assert contrast(colours[f"s{line}"], colours["paper"]) >= 3, line
        for sign in "pn":  # darker, or lighter, with every step
            steps = [contrast(colours["paper"], colours[f"{sign}{i}"]) for i in range(1, 6)]
            assert steps == sorted(steps)


def decode(code: int) -> float:
    """As the page's script does."""
    if code == 0:
        return 0.0
    rest = (code - 1) >> 1
    value = float(f"{rest % 900 + 100}e{rest // 900 - 14}")
    return -value if (code - 1) & 1 else value


def contrast(a: str, b: str) -> float:
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
