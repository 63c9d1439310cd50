import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from sepo.data import attention_cost, pair_costs

lengths = st.integers(0, 20)


@given(st.integers(1, 20), lengths, lengths)
def test_the_area_is_what_a_mask_allows(prompt, chosen, rejected):
    owner = np.repeat([0, 1, 2], [prompt, chosen, rejected])
    query, key = np.indices((len(owner), len(owner)))
    allowed = (key <= query) & ((owner[key] == 0) | (owner[key] == owner[query]))
    cost = pair_costs(np.array([prompt]), np.array([chosen]), np.array([rejected]), attention=0.25)
    assert cost == len(owner) + 0.25 * allowed.sum()


# Qwen3's heads are together wider than its model; GPT-2 has its own names for everything
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_attention_is_the_quadratic_part_of_the_counted_flop(arch):
    model = tiny_model(arch)
    model.set_attn_implementation("eager")  # its products are counted as they are

    def flop(tokens: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        return counter.get_total_flops()

    quadratic = (flop(64) - 2 * flop(32)) / (64**2 - 2 * 32**2)
    assert attention_cost(model.config, trunk_parameters=1000) * 2 * 1000 == quadratic
