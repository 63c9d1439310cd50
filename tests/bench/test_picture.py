"""README's picture is what tools/picture.py makes of bench/results, and can be read on any page."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tools import picture


def rows() -> list[dict]:
    lines = (picture.RESULTS / f"{picture.MACHINE}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_picture_is_current():
    drawn = picture.draw(picture.run_of(rows()))
    assert drawn == picture.PICTURE.read_text(), "out of date: python tools/picture.py"
    assert picture.main(["--check"]) == 0


def test_another_result_is_another_picture(tmp_path, monkeypatch):
    old = tmp_path / "step.svg"
    old.write_text(picture.PICTURE.read_text().replace("TRL 1.16.0", "TRL 1.15.0"))
    monkeypatch.setattr(picture, "PICTURE", old)
    assert picture.main(["--check"]) == 1 and "TRL 1.15.0" in old.read_text()
    assert picture.main([]) == 0 and "TRL 1.16.0" in old.read_text()


def test_its_bars_are_the_medians_of_one_run():
    run = picture.run_of(rows())
    assert len({row["date"] for row in run.values()}) == 1
    svg = ElementTree.fromstring(picture.draw(run))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width")) for bar in svg.iter(f"{space}rect")]
    seconds = [run[name]["median"] for name in picture.BARS]
    memory = [run[name]["peak_bytes"] for name in picture.BARS]
    for drawn, values in zip((bars[:5], bars[5:]), (seconds, memory), strict=True):
        longest = max(drawn)
        assert drawn == pytest.approx([longest * v / max(values) for v in values], abs=0.1)
    words = [text.text for text in svg.iter(f"{space}text")]
    assert {f"{s:.1f}" for s in seconds} <= set(words) and "sepo SePO, 30 %" in words
    # nothing is drawn beyond the picture, or over a neighbour's place
    right = [float(b.get("x")) + float(b.get("width")) for b in svg.iter(f"{space}rect")]
    assert max(right[:5]) + 40 < picture.LEFT + picture.PANEL and max(right) + 60 < picture.WIDTH


def test_the_latest_run_with_every_contender_counts():
    whole = [dict(r, date="2026-01-01") for r in picture.run_of(rows()).values()]
    later = [dict(r, date="2026-01-02") for r in whole[1:]]  # lacks one
    base = [dict(r, date="2026-01-03", side="base") for r in whole]
    run = picture.run_of([*whole, *later, *base])
    assert {row["date"] for row in run.values()} == {"2026-01-01"}
    with pytest.raises(ValueError, match="expected a run of TRL DPO, .*, got none"):
        picture.run_of(later)


def luminance(colour: str) -> float:
    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])  # a forge's, light and dark
@pytest.mark.parametrize(("what", "least"), [("TEXT", 4), ("OURS", 3), ("PEERS", 3)])
def test_it_can_be_read_on_a_light_and_on_a_dark_page(page, what, least):
    light, dark = sorted((luminance(page), luminance(getattr(picture, what))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least
