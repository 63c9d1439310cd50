"""The tables of docs/benchmarks.md are what tools/readme.py makes of bench/results, and of one run."""

import json
from pathlib import Path

import pytest

from sepo.errors import InputError
from tools import readme

ROOT = Path(__file__).parents[2]


def test_the_page_is_current():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    tables = {found["table"] for found in readme.BLOCK.finditer(text)}
    assert {"head", "step"} <= tables <= set(readme.TABLES), "a table has no block, or no name"
    assert readme.rewritten(text) == text, "out of date: python -m tools.readme"


def test_the_table_of_the_readme_is_of_that_page():
    page = set((ROOT / "docs" / "benchmarks.md").read_text().splitlines())
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line[:1] == "|"]
    assert len(table) > 3 and not set(table) - page


def head(provider, date, median, case="head-bf16-30", **more):
    row = dict(case=case, provider=provider, status="measured", ours=provider == "sepo")
    row |= dict(date=date, machine="a CPU", commit="0123456789", version="peer 1.0", note="")
    row |= dict(shape=dict(V=50000, D=64, M=30, N=100), median=median, times_gemm=median / 0.1)
    return row | dict(quartiles=[median, median], extra_bytes=2**20, errors=dict(logp=2e-7)) | more


@pytest.fixture
def rewritten(tmp_path):
    def of(*rows, table="head", machine="cpu"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "cpu.jsonl").write_text(text)
        begin = f"<!-- bench:{table} {machine} -->"
        return readme.rewritten(f"before\n{begin}\nold\n<!-- /bench -->\nafter\n", tmp_path)

    return of


def test_a_table_tells_of_one_run(rewritten):
    """The latest of those that measured most, never a contender of another day."""
    run = lambda date, median, *more: [head(n, date, median) for n in ("gemm", "sepo", *more)]
    rows = [
        *run("2026-01-01", 0.3, "dense"),
        *run("2026-01-02", 0.2, "dense"),
        *run("2026-01-03", 0.1),
    ]
    rows.append(head("cce", "2026-01-04", 0.4, note='impl="torch_compile"'))  # without ours
    rows += [head("dense", "2026-01-02", 0.9, status="refused"), {"stage": "build", "date": "2026"}]
    rows.append(head("sepo", "2026-01-02", 0.9, side="base"))
    text = rewritten(*rows)
    assert text.startswith(
        "before\n<!-- bench:head cpu -->\nA bfloat16 head of 50 000 words of width 64"
    )
    assert text.endswith("<!-- /bench -->\nafter\n") and "old" not in text
    assert "a CPU, 2026-01-02, 01234567." in " ".join(text.split())
    lines = [line for line in text.splitlines() if line.startswith("| **sepo**")]
    assert lines == ["| **sepo** | 2.00 | 200–200 | 1 | 2e-7 |"]
    assert "dense log-softmax" in text and "torch_compile" not in text
    assert rewritten(*rows) == text


def test_heads_of_a_machine_that_is_slow_in_bfloat16(rewritten):
    """Its float32 head beside all peers; its bfloat16 head beside products of the faster dtype."""
    machine = dict(machine="a CPU, AVX2 alone, emulated")
    rows = [head(n, "2026", 0.3, "head-fp32-30", **machine) for n in ("gemm", "sepo", "dense")]
    rows += [
        head("gemm", "2026", 0.3, note="3 bare products in float32"),
        head("sepo", "2026", 0.4),
    ]
    full = " ".join(rewritten(*rows, table="head-fp32").split())
    half = " ".join(rewritten(*rows).split())
    assert "A float32 head of" in full and "dense log-softmax" in full
    assert (
        "; a CPU, AVX2 alone, emulated, 2026, 01234567. GEMMs: its three bare products, 300" in full
    )
    assert "A bfloat16 head of" in half and "dense log-softmax" not in half
    assert "GEMMs: its three bare products in float32, 300 ms." in half


@pytest.mark.parametrize(
    ("table", "head_case", "kl_case"),
    [
        ("operations", "head-bf16-30", "kl-ref-policy"),
        ("operations-fp32", "head-fp32-30", "kl-fp32-ref-policy"),
    ],
)
def test_operations_beside_what_others_take(rewritten, table, head_case, kl_case):
    rows, kind = [], "fp32" if table.endswith("fp32") else "bf16"
    cases = {case.format(kind) for case in readme.OPERATIONS if not case.startswith("kl")}
    cases |= {kl_case.replace("ref-policy", name) for name in ("ref-policy", "policy-ref", "jsd")}
    assert head_case in cases and len(cases) == len(readme.OPERATIONS)
    for case in cases:
        others = {"trl_divergence": 0.6} if case.startswith("kl") else {"dense_gathered": 0.5}
        for name, median in {"gemm": 0.1, "sepo": 0.2, **others}.items():
            note = "4 bare products"
            found = head(name, "2026", median, case, note=note, times_gemm=2.0)
            found["errors"] = {"logp": 2e-7, "kl": 3e-6, "grad_weight": 1.0}
            if name == "trl_divergence":
                found["errors"] = {"kl": 5e-6, "grad_weight": 2.0}
            elif case == kl_case:
                found["errors"]["logp"] = 1e-5  # TRL gives none to compare it with
            rows.append(found)
    lines = rewritten(*rows, table=table).splitlines()
    assert "| log-probabilities | 200 | 2.00 of 4 | 2.50 |  | 3e-6 |" in lines
    kl = "| of two heads, and KL(ref ‖ policy) | 200 | 2.00 of 4 |  | 3.00 | 3e-6, 5e-6 |"
    assert kl in lines and sum("of 4" in line for line in lines) == len(readme.OPERATIONS)


def test_a_table_that_cannot_be_made_is_named(rewritten):
    with pytest.raises(InputError, match="no run of head-bf16-30 has measured ours"):
        rewritten(head("dense", "2026-01-01", 0.1))
    known = "head, head-fp32, operations, operations-fp32, step"
    with pytest.raises(InputError, match=f"expected a table of {known}, got heads"):
        rewritten(table="heads")
    with pytest.raises(InputError, match="gpu.jsonl is not there"):
        rewritten(machine="gpu")
