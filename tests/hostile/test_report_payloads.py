"""What people put into web pages to have it run, as ids, texts, names and paths of a report."""

import re
import sys
from pathlib import Path

import pytest
from tokenizers_for_tests import chatml_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "report"))
from reports import BROWSER, Page, browse, scored, write_metrics, write_store

from sepo.report import collect, render_page

RUN = "console.error('it ran')"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</SCRIPT ><script>{RUN}</script>",
    f"<!--<script>{RUN}</script>-->",
    f"--><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title></desc></svg><script>{RUN}</script>",
    f"</textarea></template><script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"'><img src=x onerror={RUN}>",
    f"<img src=x onerror={RUN}//",
    f"<svg onload={RUN}>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<body onload={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<iframe srcdoc='<script>{RUN}</script>'>",
    f'<iframe src="javascript:{RUN}">',
    f'<a href="javascript:{RUN}">x</a>',
    f"<math><mtext></mtext><script>{RUN}</script></math>",
    f'<object data="data:text/html,<script>{RUN}</script>">',
    f'<meta http-equiv=refresh content="0;url=data:text/html,<script>{RUN}</script>">',
    f'<base href="javascript:{RUN}//">',
    '<link rel=stylesheet href="data:text/css,*{background:red}">',
    f"{{{{ ''.__class__ }}}}{{% raw %}}<script>{RUN}</script>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"\u2028{RUN}\u2029//",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"\x00<script>{RUN}</script>\x1b[2J",
    f"${{{RUN}}}`;{RUN};//",
)


def report(path: Path, payloads) -> str:
    """A page with the payloads wherever text can come from."""
    pairs = [
        scored(f"{i} {text}", f"prompt {text}", f"chosen {text}", f"rejected {text}")
        for i, text in enumerate(payloads)
    ]
    every = " ".join(payloads)
    about = {f"{role}_name": f"{role} {every}" for role in ("oracle", "reference")}
    about |= {"tokenizer_name": every, "transferred": {"from": every}}
    about["reading"] = {"source": every, "dropped": dict.fromkeys(payloads, 2)}
    path.mkdir(exist_ok=True)
    store = write_store(path / "store", pairs, **about)
    run = write_metrics(path / "run", *(f'{{"step": {i}, "loss": {2 / i}}}' for i in (1, 2, 3)))
    data = collect([store], [chatml_tokenizer()], [run], max_pairs=len(pairs))
    data["runs"][0]["name"] = data["stores"][0]["name"] = every
    data["runs"][0]["metrics"] |= {text: {"step": [1], "value": [1]} for text in payloads}
    return render_page(data)


def test_no_payload_is_markup(tmp_path, figures):
    """The page has the kinds of elements, with the attributes, that it has of words, and no more."""
    texts = {"words": [f"word {i}" for i in range(len(PAYLOADS))], "wild": PAYLOADS}
    words, wild = (Page(report(tmp_path / name, texts[name])) for name in texts)
    kinds = lambda page: {(tag, *sorted(attributes)) for tag, attributes, _ in page.elements}
    assert kinds(wild) == kinds(words)
    assert len(wild.all("script")) == len(words.all("script")) == 2
    links = [value for _, a, _ in wild.elements for key, value in a.items() if key == "href"]
    assert all(link.startswith("#") for link in links)
    figures("payloads in a report", tried=len(PAYLOADS), markup=0)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_no_payload_runs(tmp_path, figures):
    """Nor does a browser say that its policy stopped one: it sees text."""
    page = report(tmp_path, PAYLOADS)
    for i in (None, *range(len(PAYLOADS))):
        dom, console = browse(page, tmp_path, at="" if i is None else f"#text={i} ")
        assert console == []
        assert len(re.findall("<script", dom)) == 2
        figures("payloads in a browser", tried=1, ran=0)
