"""Hours are sums that a hand can check; a plan says what a user would spend."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import tiny_model

from sepo.cost import gpu, lengths, paper, planner, tables
from sepo.cost.decoder import TABLE_1, Decoder, named
from sepo.cost.public import ZEPHYR
from sepo.cost.work import Amount, Schedule, step_work, total
from sepo.errors import InputError
from sepo_kernels.schedules import DEFAULT_BUDGET, MEMORY_SHARE

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
PAGE = ROOT / "docs" / "gpu-hours.md"
SIZES = np.array([(5, 7, 4), (3, 2, 6)])
DECODER = Decoder.of(tiny_model())


# Steps


def test_padding_is_what_padded_rows_hold_besides_tokens():
    work = step_work(DECODER, SIZES, 19, Schedule(packed=False, selected=False), pairs_at_once=1)
    tokens, filled = 12 + 9 + 5 + 9, 2 * 12 + 2 * 9
    a_token = 6 * DECODER.weights
    assert work["trunk", "products"].flop == a_token * tokens
    assert work["padding", "products"].flop == a_token * (filled - tokens)
    head = 6 * DECODER.width * DECODER.vocabulary
    assert work["unused logits", "logits"].flop == head * (filled - 19)
    together = step_work(DECODER, SIZES, 19, Schedule(packed=False))
    assert together["padding", "products"].flop == a_token * (4 * 12 - tokens)


@pytest.mark.parametrize("once", (True, False))
@pytest.mark.parametrize("packed", (True, False))
def test_attention_computes_what_the_mask_shows(once, packed):
    """Every pair of a query and a key, one by one."""
    schedule = Schedule(packed=packed, prompt_once=once, hidden_scores=True)
    work = step_work(DECODER, SIZES, 19, schedule)
    shown = computed = filled = 0
    for p, *responses in SIZES:
        for number, length in enumerate(responses):
            first = p if packed and once and number else 0  # the prompt's queries were there before
            row = p + length
            shown += sum(key <= query for query in range(first, row) for key in range(row))
            computed += (row - first) * row
            filled += 12 * 13 // 2
    product = 2 * DECODER.layers * DECODER.query_width  # FLOP of one query and one key
    assert work["attention", "attention"].flop == 6 * product * shown
    assert work["recomputation", "attention"].flop == product * shown
    more = 0 if packed else filled - shown
    assert work["padding", "attention"].flop == 7 * product * more
    hidden = computed - shown if packed else 4 * 12**2 - filled
    assert work["hidden scores", "attention"].flop == 7 * product * hidden


def test_weights_are_read_for_every_micro_batch():
    bytes = [
        step_work(DECODER, SIZES, 19, tokens_at_once=many)["trunk", "products"].bytes
        for many in (100, 14, 9)
    ]
    assert np.diff(bytes).tolist() == [12 * DECODER.weights] * 2  # 1, 2, 3 micro-batches


def test_logits_are_made_again_beyond_the_budget_that_the_library_takes():
    """A CPU's 1 GiB, an eighth of a GPU's memory; the KL's operation keeps two blocks."""

    def again(rows: int, kl: bool = False, **where) -> bool:
        work = step_work(DECODER, SIZES, rows, Schedule(kl=kl), **where)
        return ("recomputation", "logits") in work

    fits = DEFAULT_BUDGET // (2 * DECODER.vocabulary)
    assert not again(fits) and again(fits + 1) and again(fits, kl=True)
    a100 = gpu.find("A100").memory
    fits = int(a100 / MEMORY_SHARE / (2 * DECODER.vocabulary))
    assert not again(fits, memory=a100) and again(fits + 1, memory=a100)
    assert again(fits, kl=True, memory=a100)
    assert not again(fits, kl=True, memory=a100, tokens_at_once=20)  # two micro-batches


def test_a_host_takes_part_only_where_it_is_asked_to():
    how = dict(reference="live", host_optimiser=True, host_reference=True)
    work = step_work(DECODER, SIZES, 19, Schedule(**how), steps=3, gathered_over=4)
    count = DECODER.parameters
    assert total(work, ("optimiser",)) == Amount()
    moved = 3 * 4 * count + 2 * count / 4
    assert work["offload", "host"] == Amount(host=moved, host_memory=3 * 30 * count * 4)
    assert work["gathering", "link"].link == 2 * 4 * count * 3 / 4  # three passes and a reference


# Hours


def test_the_slower_of_computing_and_moving_counts():
    a100 = gpu.find("A100")
    work = {
        ("trunk", "products"): Amount(flop=3600 * 312e12, bytes=1800 * 2.0e12),
        ("trunk", "elementwise"): Amount(bytes=3600 * 2.0e12),
        ("gathering", "link"): Amount(link=7200 * 300e9),
    }
    full = dict(utilisation=1.0, bandwidth_share=1.0)
    found = gpu.part_hours(work, a100, **full)
    assert (found["trunk"], found["gathering"], sum(found.values())) == pytest.approx((2, 2, 4))
    half = gpu.part_hours(work, a100, utilisation=0.5, bandwidth_share=0.25)
    assert half["trunk"] == pytest.approx(2 + 4)
    assert gpu.hours_at_full_rate(work, a100) == pytest.approx(1)
    slow = gpu.part_hours(work, a100, arithmetic=gpu.FLOAT32, **full)
    assert slow["trunk"] == pytest.approx(312 / 19.5 + 2)


def test_split_products_are_three_or_two_at_the_16_bit_rate():
    """104 and 156 TFLOP/s of an A100; attention stays in float32, and halves have to be made."""
    a100, hour = gpu.find("A100"), 3600
    work = {
        ("reference", "products"): Amount(flop=hour * 312e12, bytes=hour * 2.0e12 / 8),
        ("reference", "attention"): Amount(flop=hour * 19.5e12),
        ("reference", "elementwise"): Amount(bytes=hour * 2.0e12),
    }
    full = dict(utilisation=1.0, bandwidth_share=1.0)
    for arithmetic, products in ((gpu.SPLIT, 3), (gpu.SPLIT_EXACT, 2)):
        found = gpu.hours(work, a100, arithmetic=arithmetic, **full)
        assert found == pytest.approx((products + 4 / 8) + 1 + 2)
        assert gpu.hours_at_full_rate(work, a100, arithmetic=arithmetic) == products + 1
    # bound by memory: three products read what three do, after halves were made of it
    moved = {("reference", "logits"): Amount(bytes=hour * 2.0e12)}
    assert gpu.hours(moved, a100, arithmetic=gpu.SPLIT, **full) == pytest.approx(3 + 4)
    assert gpu.hours_at_full_rate(work, a100, arithmetic=gpu.FLOAT32) == 312 / 19.5 + 1


def test_gpus_are_found_by_the_drivers_names():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA A100 80GB PCIe": "A100-PCIe",
        "NVIDIA H200": "H200",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA GeForce RTX 4090": None,
    }
    found = {name: gpu.of_device(name) for name in names}
    assert {name: one and one.name for name, one in found.items()} == names
    with pytest.raises(InputError, match="gpu: expected B200 .* got V100"):
        gpu.find("V100")


def test_drawn_lengths_have_the_means_that_are_known():
    found = lengths.from_means(100, 300, 200, pairs=61_135)
    np.testing.assert_allclose(found.whole.mean(0), (100, 300, 300))
    np.testing.assert_allclose(found.cut.mean(0), (100, 200, 200))
    assert np.log(found.whole).std(0) == pytest.approx(0.6, rel=0.03)
    assert found.selected(0.3) == pytest.approx(0.3 * found.whole[:, 1:].sum(), rel=0.01)
    with pytest.raises(InputError, match="cut to no more than the response, got 100, 300, 301"):
        lengths.from_means(100, 300, 301, pairs=1)


def test_the_last_of_tokens_drawn_at_random_is_where_draws_have_it():
    found = lengths.Lengths(np.array([(1.0, 40.0, 10.0)]), None, 1)
    rng = np.random.default_rng(0)
    last = lambda n, k: np.mean([rng.permutation(n)[:k].max() + 1 for _ in range(4000)])
    (expected,) = lengths.drawn_at_random(found, 0.3)
    assert expected == pytest.approx((1, last(40, 12), last(10, 3)), rel=0.01)


# The paper's table


def test_what_is_known_of_the_paper_comes_out():
    assert paper.sepo_hours_at_full_rate("LLaMA3-8B") == pytest.approx(1.75, abs=0.005)
    assert paper.flop_ratio("LLaMA3-8B") == pytest.approx(0.58, abs=0.005)
    # the whole model says the same of the layers, if all pairs are as long as the mean
    work = paper.epoch("LLaMA3-8B", "sepo", paper.AS_RELEASED, spread=0.0)
    layers = work["trunk", "products"].flop / paper.A100.flop / 3600
    assert layers == pytest.approx(1.75, abs=0.005)


def test_every_saving_saves_and_every_hour_names_what_it_assumes():
    text = tables.table1()
    assert text.startswith("Modelled, not measured")
    assert "products at 60% of the rate" in " ".join(text.split()) and text.count("at 100 %") >= 4
    for method, steps in tables.SAVINGS.items():
        for model in TABLE_1:
            spent = [
                gpu.hours(paper.epoch(model, method, schedule, truncated=cut), paper.A100)
                for _, schedule, cut in steps
            ]
            # where DPO's logits of the responses exceed the head's budget they are made again
            assert all(b < 1.005 * a for a, b in zip(spent, spent[1:], strict=False)), spent


def test_a_public_run_lies_between_the_gpus_that_it_may_have_had():
    """Its own numbers; the model, as it is, for both kinds of GPU with 80 GB."""
    assert ZEPHYR.hours == pytest.approx(5328.4749 * 8 / 3600)
    slow, quick = (ZEPHYR.modelled(gpu.find(name)) for name in ("A100", "H100"))
    assert quick < ZEPHYR.hours < slow
    # two forward passes, and a backward one that costs two
    tokens = 2 * paper.PAIRS * 496
    flop = 8 * named("Mistral-7B").weights * tokens
    share = flop / paper.A100.flop / 3600 / ZEPHYR.hours
    # the longest are cut, the head's part comes on top
    assert ZEPHYR.share_of_the_rate(paper.A100) == pytest.approx(share, rel=0.1)


# Plans


@pytest.fixture
def write(tmp_path):
    tiny_model().config.save_pretrained(tmp_path / "model")

    def write(**keys) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({"model_name_or_path": str(tmp_path / "model")} | keys))
        return path

    return write


def stages(text: str) -> dict[str, tuple[float, float, float]]:
    rows = re.findall(r"^(\w+) .*?([\d.]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    return {name: tuple(map(float, numbers)) for name, *numbers in rows}


def test_a_plan_adds_up(write):
    keys = dict(model_name_or_path="LLaMA3-8B", oracle_model="TinyLlama-1.1B")
    found = stages(planner.plan(write(**keys, gradient_checkpointing=True)))
    assert list(found) == ["SFT", "reference", "oracle", "score", "train", "all"]
    *parts, everything = found.values()
    np.testing.assert_allclose(np.sum(parts, 0), everything, atol=0.03)
    spent, alone, full = everything
    assert alone == pytest.approx(spent / 4, abs=0.01) and full < spent


def test_a_reference_reads_every_pair_once_whatever_the_oracle_sees(write):
    keys = dict(model_name_or_path="LLaMA3-8B", oracle_model="TinyLlama-1.1B", pairs=6000)
    whole, some = (stages(planner.plan(write(**keys, oracle_pairs=n))) for n in (6000, 1500))
    assert whole["score"] == whole["reference"] == some["score"] == some["reference"]
    for name in ("SFT", "oracle"):
        assert some[name] == pytest.approx(np.divide(whole[name], 4), abs=0.02)


def test_split_scoring_is_a_plans_other_arithmetic(write):
    keys = dict(model_name_or_path="LLaMA3-8B", oracle_model="TinyLlama-1.1B")
    texts = [
        planner.plan(write(**keys, **more))
        for more in (
            {},
            dict(scoring_arithmetic="split"),
            dict(scoring_arithmetic="split", bfloat16_checkpoints=True),
        )
    ]
    wide, three, two = map(stages, texts)
    assert all(wide[name] == three[name] == two[name] for name in ("SFT", "oracle", "train"))
    assert two["score"] < three["score"] < wide["score"]
    # products alone are 312 / 3 against 19.5; attention is not split, and is not in the products
    assert 1 < three["score"][2] / (wide["score"][2] * 3 * 19.5 / 312) < 1.2
    said = [" ".join(text.split()) for text in texts]
    assert "scoring, 19.5 TFLOP/s in float32" in said[0]
    assert "3 products of 16-bit halves for one (104 TFLOP/s)" in said[1]
    assert "2 products of 16-bit halves for one (156 TFLOP/s)" in said[2]


def test_a_plan_says_what_would_make_it_cheaper(write):
    keys = dict(model_name_or_path="LLaMA3-8B", oracle_model="TinyLlama-1.1B")
    last = lambda **more: " ".join(planner.plan(write(**keys, **more)).split("\n\n")[-1].split())
    spent = lambda **more: stages(planner.plan(write(**keys, **more)))["all"][0]
    items = last().rstrip(".").split(" save: ")[1].split("; ")
    told = {item.split()[0].rstrip(":"): item.rpartition(", ")[2] for item in items}
    for key, value in (("scoring_arithmetic", "split"), ("oracle_pairs", 15283), ("sft_epochs", 1)):
        saved = spent() - spent(**{key: value})
        assert float(told[key]) == pytest.approx(saved, abs=0.02), key
    assert [*map(float, told.values())] == sorted(map(float, told.values()), reverse=True)
    assert "bfloat16_checkpoints" not in told and "selective_checkpointing" not in told
    assert "selective_checkpointing" in last(gradient_checkpointing=True)
    assert "bfloat16_checkpoints" in last(scoring_arithmetic="split")
    alone = planner.plan(write(method="simpo", model_name_or_path="LLaMA2-7B"))
    assert alone.endswith("save: nothing that a plan can say.")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(write, path):
    recipe = yaml.safe_load(path.read_text())
    found = stages(planner.plan(write(**recipe, gpus=1)))
    assert "train" in found and "all" in found


def test_the_pages_plan_says_what_the_page_shows(tmp_path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (config,) = (text for kind, text in blocks if kind == "yaml")
    for more in ("", "scoring_arithmetic: split\n"):
        (tmp_path / "plan.yaml").write_text(config + more)
        assert any(planner.plan(tmp_path / "plan.yaml") == text.strip() for _, text in blocks)


def test_the_pages_tables_are_current():
    for part in tables.table1().split("\n\n"):
        assert part in PAGE.read_text(), "sepo plan --papers says otherwise"


def test_twice_the_utilisation_or_half_the_pairs_is_half_the_time(write):
    keys = dict(method="simpo", model_name_or_path="LLaMA2-7B", gpus=1)
    base, half = (stages(planner.plan(write(**keys, pairs=n)))["train"] for n in (8000, 4000))
    assert half == pytest.approx(np.array(base) / 2, abs=0.02)
    slow = stages(planner.plan(write(**keys, pairs=8000, utilisation=0.3)))["train"]
    assert slow[0] > 1.5 * base[0] and slow[2] == base[2]


def test_a_measured_rate_becomes_hours_beside_the_models(write):
    keys = dict(method="simpo", model_name_or_path="LLaMA2-7B", pairs=6000, num_train_epochs=2)
    lengths = dict(prompt_tokens=100, response_tokens=250)
    text = " ".join(planner.plan(write(**keys, **lengths, tokens_per_second=500)).split())
    # 100 + 2 * 250 tokens a pair, the prompt read once
    assert "7.2 million tokens" in text and "make 4.00 GPU-hours of training" in text
    modelled = stages(planner.plan(write(**keys, **lengths)))["train"][0]
    assert f"the model says {modelled:.2f}." in text


@pytest.mark.parametrize(
    ("method", "keys", "kept"),
    [
        ("confpo", {}, planner.BELOW_MEAN),
        ("selective-dpo", {}, 0.4),
        ("selective-dpo", dict(selection_quantile=0.9), 0.1),
        ("sepo-entropy", dict(fraction=0.2), 0.2),
    ],
)
def test_a_rule_costs_one_product_of_all_rows_and_three_of_the_kept(write, method, keys, kept):
    """Beside the same loss on all tokens, three of all; nothing else of the step changes."""
    given = dict(model_name_or_path="LLaMA2-7B", gpus=1, pairs=8000)
    base = "dpo" if method == "selective-dpo" else "simpo"
    full = lambda text: stages(text)["train"][2]
    text = planner.plan(write(**given, **keys, method=method))
    found, all_rows = full(text), full(planner.plan(write(**given, method=base)))
    assert f"then with one at {kept:.0%} of them" in " ".join(text.split())
    # rows of 4096 states, 32000 words, 744 response tokens a pair; the data sheet's rate
    product = 2 * 4096 * 32_000 * 744 * 8000 / gpu.GPUS["A100"].flop / 3600
    assert all_rows - found == pytest.approx((2 - 3 * kept) * product, abs=0.02)


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(gpuz=4, pears=3), "no recipe and no plan has a key gpuz\n.*key pears$"),
        (dict(utilisation=1.5), r"utilisation: expected a number in \(0, 1\], got 1.5"),
        (dict(gpus=0), "gpus: expected a positive number, got 0"),
        (dict(pairs=2.5), "pairs: expected a positive number, got 2.5"),
        (dict(gpu="V100"), "gpu: expected B200"),
        (
            dict(scoring_arithmetic="tf32"),
            r"scoring_arithmetic: expected float32 \| split, got tf32",
        ),
        (dict(method="ppo"), "method: expected sft"),
        (dict(fraction="mass"), "how many tokens mass takes is not known"),
        (
            dict(method="selective-dpo", selection_quantile="most"),
            r"selection_quantile: expected a number in \[0, 1\], got most",
        ),
        (dict(fraction=2), r"fraction: expected a number in \(0, 1\], got 2"),
        (dict(model_name_or_path=None), "expected model_name_or_path"),
        (dict(truncated_tokens=999), "cut to no more than the response"),
        (dict(oracle_model="GPT-9"), "directory or one of .* got GPT-9"),
    ],
)
def test_a_plan_refuses_by_name(write, keys, message):
    with pytest.raises(InputError, match=message):
        planner.plan(write(**keys))


def test_an_oracle_that_saves_nothing_never_pays_back():
    stage = lambda hours: planner.Stage("train", "", hours, hours)
    dear, cheap = planner.break_even([stage(6.0), stage(2.0)], stage(5.0), stage(1.0))[1:]
    assert "each run saves 3.00, and the oracle has paid after 2.0 runs" in dear
    assert "nothing is saved" in cheap
    assert named("Pythia-410M").layers == 24
