import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sepo.data import Segment, all_positions, pack, truncate

ids = lambda *values: np.array(values, np.int32)


def test_layout_of_two_pairs():
    batch = pack(
        [
            (ids(1, 2), truncate(ids(3, 4, 5), ids(0, 2)), truncate(ids(6, 7), ids(0))),
            (ids(8), truncate(ids(9), ids(0)), truncate(ids(10, 11), ids(1))),
        ]
    )
    #                 prompt  chosen  prompt  rejected: response[:last], so [6, 7][:0] is nothing
    assert batch.tokens.tolist() == [1, 2, 3, 4, 8, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.spans == ((0, 2, 4, 4), (4, 5, 5, 6))
    assert batch.prefix_end.tolist() == [2, 5]
    assert batch.rejected_start.tolist() == [4, 5]
    assert batch.pair_end.tolist() == [4, 6]
    # row 1, the prompt's last, predicts the first token of both responses
    assert batch.rows.tolist() == [1, 3, 1, 4, 5]
    assert batch.targets.tolist() == [3, 5, 6, 9, 11]
    assert batch.cu_rows.tolist() == [0, 2, 3, 4, 5]
    assert batch.weights.tolist() == [1.0] * 5
    assert batch.ref_logp is None


def test_first_rejected_token_is_predicted_by_the_prompt():
    response = ids(3, 4, 5)
    whole = truncate(response, all_positions(3))
    batch = pack([(ids(1, 2), whole, whole)])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 3, 4]
    assert batch.rows.tolist() == [1, 2, 3, 1, 4, 5]  # not 3, the row before it in the buffer
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3]


triple = st.integers(0, 10_000).map(np.random.default_rng)


@given(triple, st.integers(1, 4))
def test_every_row_predicts_its_target_from_its_own_history(rng, pairs):
    """Rebuild, from the packed buffer alone, what each target is predicted from."""
    data, segments = [], []
    for _ in range(pairs):
        prompt, *responses = (rng.integers(0, 99, rng.integers(1, 8)).astype("i4") for _ in "pcr")
        picks = [np.flatnonzero(rng.random(len(y)) < 0.5).astype("i4") for y in responses]
        picks = [p if len(p) else ids(len(y) - 1) for p, y in zip(picks, responses, strict=True)]
        data.append((prompt, responses, picks))
        segments.append((prompt, *map(truncate, responses, picks)))
    batch = pack(segments)
    tokens, rows, targets = (x.tolist() for x in (batch.tokens, batch.rows, batch.targets))
    m = 0
    for (start, prefix_end, rejected_start, _), (prompt, responses, picks) in zip(
        batch.spans, data, strict=True
    ):
        for begin, response, pick in zip(
            (prefix_end, rejected_start), responses, picks, strict=True
        ):
            for t in pick:
                own = [] if rows[m] < prefix_end else tokens[begin : rows[m] + 1]
                assert tokens[start:prefix_end] + own == [*prompt, *response[:t]]
                assert targets[m] == response[t]
                m += 1
    assert m == len(rows) == batch.cu_rows[-1]


def test_weights_and_reference_travel_with_their_token():
    weight, ref = np.array([0, 2, 0.5], "f4"), np.array([-1, -2, -3], "f4")
    segment = truncate(ids(3, 4, 5), ids(1, 2), weight=weight, ref_logp=ref)
    batch = pack([(ids(1), segment, segment)])
    assert batch.weights.tolist() == [2, 0.5, 2, 0.5]
    assert batch.ref_logp.tolist() == [-2, -3, -2, -3]


def test_a_mask_travels_with_its_token_if_every_segment_has_one():
    segment = truncate(ids(3, 4, 5), ids(0, 2), mask=np.array([0.1, 0.2, 0.3], "f4"))
    empty = truncate(ids(3), ids(), mask=np.array([0.9], "f4"))
    batch = pack([(ids(1), segment, empty), (ids(2), segment, segment)])
    assert batch.mask.tolist() == np.array([0.1, 0.3] * 3, "f4").tolist()
    assert batch.weights.tolist() == [1.0] * 6
    assert pack([(ids(1), segment, truncate(ids(3), ids(0)))]).mask is None


def test_no_pairs_leave_one_row_to_run_the_model_on():
    batch = pack([])
    assert batch.tokens.shape == (1,) and batch.num_pairs == 0
    assert batch.rows.shape == batch.targets.shape == batch.ref_logp.shape == (0,)
    assert batch.mask.shape == (0,)
    assert batch.cu_rows.tolist() == [0]


def test_dtypes_and_move():
    batch = pack([(ids(1), truncate(ids(2), ids(0)), truncate(ids(3), ids(0)))]).to("meta")
    assert batch.rows.device.type == "meta" and batch.spans == ((0, 1, 1, 1),)
    assert (batch.tokens.dtype, batch.rows.dtype) == (torch.int64, torch.int32)
    assert (batch.targets.dtype, batch.cu_rows.dtype) == (torch.int64, torch.int32)


def test_one_token_too_many_cut_is_noticed():
    segment = Segment(response=ids(3), positions=ids(2), targets=np.array([5]))
    with pytest.raises(ValueError, match="position 2 is predicted by response token 1"):
        pack([(ids(1), segment, segment)])


@pytest.mark.parametrize("positions", [(1, 0), (0, 0), (-1,)])
def test_positions_must_ascend(positions):
    segment = Segment(ids(3, 4), ids(*positions), np.zeros(len(positions), np.int64))
    with pytest.raises(ValueError, match="expected ascending positions >= 0"):
        pack([(ids(1), segment, segment)])


def test_a_prompt_is_needed():
    segment = truncate(ids(2), ids(0))
    with pytest.raises(ValueError, match="prompt of at least one token"):
        pack([(ids(), segment, segment)])


def test_tokens_of_another_model_are_noticed():
    segment = truncate(ids(7), ids(0))
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 7\), got 1 to 7"):
        pack([(ids(1), segment, segment)], vocab_size=7)
