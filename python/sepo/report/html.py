"""Collected data as one HTML file that needs no network."""

import base64
import hashlib
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from sepo.report.charts import TABLE_SHARES, run_charts, short_names, signed, store_charts, table
from sepo.report.figures import draw, key
from sepo.report.ranks import GRID
from sepo.report.scored import SIDES
from sepo.report.texts import visible


def render_page(data: dict) -> str:
    """The report as HTML: what `collect` returned, all of its text escaped."""
    loader = jinja2.PackageLoader("sepo.report", "template")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # as small as it goes; the filter escapes <, >, & and ' so that no text can end the script
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    environment.filters |= {"visible": visible, "signed": signed}
    style, script = (_source(loader, environment, name) for name in ("report.css", "report.js"))
    return environment.get_template("report.html.j2").render(
        data=data,
        sides=SIDES,
        names=short_names([store["name"] for store in data["stores"]]),
        store_charts=store_charts(data),
        run_charts=run_charts(data["runs"]),
        share_rows=[(percent, GRID.index(percent / 100)) for percent in TABLE_SHARES],
        draw=draw,
        key=key,
        table=table,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        packed=packed(data),
    )


def packed(data: dict) -> dict[str, Any]:
    """The responses for the page's script: of each token two bytes for its string and its score."""
    strings, order = data["strings"], np.dtype("<u2" if len(data["strings"]) <= 1 << 16 else "<u4")
    pairs = [
        {
            "id": pair["id"],
            "prompt": pair["prompt"],
            "responses": [
                {side: one and _pack(one, order) for side, one in store.items()}
                for store in pair["responses"]
            ],
        }
        for pair in data["pairs"]
    ]
    return {
        "strings": strings,
        "bytes": order.itemsize,
        "shown": data["shown"],
        "stores": [
            {"name": name, "scale": store["scale"]}
            for name, store in zip(
                short_names([s["name"] for s in data["stores"]]), data["stores"], strict=True
            )
        ],
        "pairs": pairs,
    }


def encode_score(score: np.ndarray) -> np.ndarray:  # (T,) float -> (T,) uint16
    """Three significant digits in two bytes: 0, or 1 + is_negative + 2 (digits - 100 + 900 exponent).

    The value is digits × 10^(exponent - 14), digits from 100 to 999, exponent from 0 to 35; what is
    smaller than 1e-12 nats is 0, and no score is larger.
    """
    code = np.zeros(len(score), np.uint16)
    for i, value in enumerate(score):
        if value and np.isfinite(value):
            mantissa, power = f"{abs(value):.2e}".split("e")
            exponent = int(power) + 12
            if 0 <= exponent < 36:
                digits = int(mantissa.replace(".", ""))
                code[i] = 1 + (value < 0) + 2 * (digits - 100 + 900 * exponent)
    return code


def _pack(response: dict, order: np.dtype) -> dict:
    score = response["score"]
    return {
        "tokens": _base64(np.array(response["tokens"], order)),
        "score": None if score is None else _base64(encode_score(np.array(score))),
        "level": response["level"],
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _source(loader: jinja2.BaseLoader, environment: jinja2.Environment, name: str) -> Markup:
    """A file of the page as it stands: the policy names the hash of these bytes."""
    return Markup(loader.get_source(environment, name)[0])


def _hash(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
