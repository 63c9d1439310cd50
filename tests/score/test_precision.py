"""What a lower precision does to scores is measured, said and kept."""

import numpy as np
import pytest
import torch
from scoring_for_tests import QUIET, make_pairs, save_models, tiny_in
from tiny import random_scored_pairs, tiny_model

from sepo.data.store.store import ScoredStore
from sepo.model.load import load_model
from sepo.model.prepare import prepare_model
from sepo.score.logp import response_logp
from sepo.score.precision import compare_scores, describe
from sepo.score.score import score_dataset, score_pairs


def test_lower_precision_is_checked_unasked(tmp_path, capsys):
    paths = save_models(tmp_path)
    reference, oracle = (load_model(p, dtype=torch.bfloat16) for p in paths)
    score_dataset(make_pairs(), tmp_path / "out", reference=reference, oracle=oracle, **QUIET)
    printed = capsys.readouterr().out
    assert "reference bfloat16 and oracle bfloat16 against float32 on 10 pairs" in printed
    assert "of the tokens selected at 30 %, " in printed
    check = ScoredStore.open(tmp_path / "out").manifest["precision_check"]
    assert check["float32_weights"] == ["checkpoint"]
    # the same from outside: float32 scores of the checkpoints against the stored ones
    exact = score_pairs(make_pairs(), *map(load_model, paths))
    errors = np.concatenate(
        [
            getattr(stored, side) - getattr(pair, side)
            for stored, pair in zip(ScoredStore.open(tmp_path / "out").pairs(), exact, strict=True)
            for side in ("chosen_score", "rejected_score")
        ]
    )
    assert check["error_max"] == pytest.approx(np.abs(errors).max(), rel=0.1)
    assert 0 < check["overlap"]["0.3"] < 1


def test_precision_check_of_models_changed_in_memory(tmp_path, capsys):
    paths = save_models(tmp_path)
    reference, oracle = (load_model(p, dtype=torch.bfloat16) for p in paths)
    with torch.no_grad():
        oracle.get_input_embeddings().weight += 1  # no longer what its checkpoint holds
    models = dict(reference=reference, oracle=oracle)
    score_dataset(make_pairs(), tmp_path / "out", **models, precision_check=3, **QUIET)
    check = ScoredStore.open(tmp_path / "out").manifest["precision_check"]
    assert check["pairs"] == 3 and check["float32_weights"] == ["checkpoint", "rounded"]


def test_precision_check_can_be_switched_off(tmp_path, capsys):
    models = dict(reference=tiny_in(torch.bfloat16, 0), oracle=tiny_in(torch.bfloat16, 1))
    score_dataset(make_pairs(), tmp_path, **models, precision_check=0, **QUIET)
    assert "precision check" not in capsys.readouterr().out


def test_precision_check_of_a_reference_alone_says_nothing_of_selection(tmp_path, capsys):
    model = tiny_in(torch.bfloat16, 0)
    score_dataset(make_pairs(), tmp_path, reference=model, keep=("logp",), **QUIET)
    printed = capsys.readouterr().out
    assert "log-probability error" in printed and "Jaccard" not in printed


def test_overlap_counts_chosen_highest_and_rejected_lowest():
    array = lambda *values: np.array(values, np.float32)
    rising, falling = array(*range(10)), array(*range(10, 0, -1))
    exact = [(rising, rising)]
    assert compare_scores(exact, exact)["overlap"] == {"0.1": 1, "0.3": 1, "0.5": 1}
    # highest 3 of rising: 7 8 9, of falling: 0 1 2; lowest 3 alike: one side agrees, one does not
    found = compare_scores([(falling, rising)], exact)
    assert found["overlap"]["0.3"] == pytest.approx(3 / 9)
    assert (found["error_max"], found["error_mean"]) == (10, 2.5)
    assert found["spread"] == pytest.approx(np.std(range(10)))
    # what is not selected may differ: the lowest of the chosen, the highest of the rejected
    low, high = array(4, 3, 2, 1, 0, *range(5, 10)), array(*range(5), 9, 8, 7, 6, 5)
    assert compare_scores([(low, high)], exact)["overlap"]["0.3"] == 1


@pytest.mark.parametrize(
    ("jaccard", "words"),
    [
        (1.0, "0% are not the ones float32 selects: good enough."),
        (0.88, "6% are not the ones float32 selects: tolerable; float32 is the safe choice."),
        (0.3, "54% are not the ones float32 selects (random choice: 70%): score in float32."),
    ],
)
def test_precision_in_words(jaccard, words):
    scores = [(np.zeros(1, np.float32),) * 2]
    result = compare_scores(scores, scores)
    result["overlap"]["0.3"] = jaccard
    text = describe(result, "bfloat16")
    assert words in text and f"{jaccard:.2f} at 30%" in text


def test_scores_are_made_without_tf32():
    """transformers switches it on for the whole process under --tf32 or --torch_compile."""
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []
    model = prepare_model(tiny_model())
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append((matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
    )
    matmul.fp32_precision = "tf32"
    try:
        response_logp(model, random_scored_pairs(2), "reference", 100)
        assert seen == [("ieee", "ieee")] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
        handle.remove()
