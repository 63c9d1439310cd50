"""SparsePO's learned mask: its formula, its gradients, its numbers, and its file."""

import json
import math

import pytest
import torch
from recorder import allocator_peak
from safetensors.torch import save_file
from torch.func import functional_call

from sepo.errors import InputError
from sepo.masks import (
    MASK_FILE,
    SparseMask,
    decayed,
    load_into,
    load_mask,
    save_mask,
)

F64 = dict(dtype=torch.float64)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def mask_of(num_layers, width, *, seed=0, **options) -> SparseMask:
    """Weights of ordinary size, where the initial 0.02 would leave every mask near zero."""
    mask = SparseMask(num_layers, width, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mask.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, **F64))
        for part in mask.children():
            part.mixer.abs_()[1::2].neg_()  # some tokens come out above zero, some at it
    return mask


def plain(part, states) -> list[float]:
    """The formula, a number at a time."""
    numbers = lambda tensor: tensor.detach().tolist()
    values = []
    for m in range(states.shape[1]):
        total = 0.0
        for layer, row in enumerate(states[:, m].tolist()):
            if part.norm is not None:
                mean = sum(row) / len(row)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
                scale, shift = numbers(part.norm.weight), numbers(part.norm.bias)
                row = [
                    (x - mean) / deviation * a + b
                    for x, a, b in zip(row, scale, shift, strict=True)
                ]
            dot = sum(w * x for w, x in zip(numbers(part.weight[layer]), row, strict=True))
            total += numbers(part.mixer)[layer] * max(0.0, dot + numbers(part.bias)[layer])
        values.append(max(0.0, total))
    return values


def draw_states(*shape, seed=3, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **(F64 | options))


def test_golden_mask():
    mask = SparseMask(2, 4).double()
    weight = torch.tensor([0.5, -0.25, 0.1, 0.3], **F64)
    with torch.no_grad():
        mask.reward.weight.copy_(torch.stack([weight, -weight]))
        mask.reward.bias.fill_(0.1)
        mask.reward.mixer.copy_(torch.tensor([0.7, -0.4], **F64))
    t, v = torch.arange(3, **F64)[:, None], torch.arange(4, **F64)
    states = torch.stack([torch.sin(0.9 * t + 1.3 * v + layer) for layer in range(2)])
    found = mask(states)[0]
    torch.testing.assert_close(
        found, torch.tensor([0, 0, 0.35528606270267465], **F64), rtol=0, atol=1e-15
    )
    assert found[0] == found[1] == 0  # exactly: these tokens count as sparse


@pytest.mark.parametrize("layernorm", [True, False])
@pytest.mark.parametrize("independent", [True, False])
def test_the_formula(independent, layernorm):
    mask, states = (
        mask_of(3, 5, independent=independent, layernorm=layernorm),
        draw_states(3, 40, 5),
    )
    reward, kl = mask(states)
    assert 0.2 < (reward == 0).double().mean() < 0.8
    close(reward, torch.tensor(plain(mask.reward, states), **F64))
    if not independent:
        assert kl is reward
        return
    assert (reward - kl).abs().max() > 0.1
    close(kl, torch.tensor(plain(mask.kl, states), **F64))


@pytest.mark.parametrize("layernorm", [True, False])
def test_gradients(layernorm):
    mask = mask_of(2, 4, independent=True, layernorm=layernorm)
    states, names = draw_states(2, 6, 4), [name for name, _ in mask.named_parameters()]
    call = lambda *values: functional_call(mask, dict(zip(names, values, strict=True)), states)
    torch.autograd.gradcheck(call, tuple(mask.parameters()))
    assert all((value > 0).any() for value in mask(states))


def test_the_reference_gets_no_gradient():
    states = draw_states(2, 6, 4).requires_grad_()
    reward, kl = mask_of(2, 4, independent=True)(states)
    (reward.sum() + kl.sum()).backward()
    assert states.grad is None


def test_binary_is_0_or_1_with_the_gradient_of_the_mask():
    states, upstream = draw_states(3, 200, 5), draw_states(200, seed=4)
    options = dict(independent=True)
    soft, hard = mask_of(3, 5, **options), mask_of(3, 5, binary=True, **options)
    for mask in (soft, hard):
        with torch.no_grad():
            mask.reward.mixer *= 1e8  # added to such a number, 1 is rounded away
        reward, kl = mask.float()(states)
        (reward @ upstream.float() + kl @ upstream.float().sin()).backward()
    assert set(hard(states)[0].tolist()) == {0.0, 1.0}
    for expected, found in zip(soft(states), hard(states), strict=True):
        assert torch.equal(found, (expected > 0).float())
    for expected, found in zip(soft.parameters(), hard.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad) and expected.grad.any()


@pytest.mark.parametrize("layernorm", [True, False])
def test_no_rows_give_zero_gradients_to_all(layernorm):
    """Not None: a rank without pairs takes part in the others' sums."""
    mask = SparseMask(3, 5, independent=True, layernorm=layernorm)
    reward, kl = mask(torch.empty(3, 0, 5))
    assert reward.shape == kl.shape == (0,)
    (reward.sum() + kl.sum()).backward()
    for parameter in mask.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_computed_in_float32_whatever_surrounds_it():
    mask, states = mask_of(3, 16).float(), draw_states(3, 30, 16).bfloat16()
    expected = mask(states)[0]
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = mask(states)[0]
    assert torch.equal(found, expected)
    expected.sum().backward()
    alone = mask.reward.weight.grad.clone()
    mask.zero_grad()
    found.sum().backward()
    assert torch.equal(mask.reward.weight.grad, alone)
    # parameters that arrive in 16 bits round the mask once, not at every step
    half = mask_of(3, 16).bfloat16()
    widened = SparseMask(3, 16)
    widened.load_state_dict(half.state_dict())
    assert torch.equal(half(states)[0], widened(states)[0])


def test_holds_no_second_copy_of_the_states():
    states = draw_states(16, 64, 128, dtype=torch.float32)
    mask = SparseMask(16, 128, independent=True)
    run = lambda: sum(value.sum() for value in mask(states)).backward()
    run()  # the gradients' own memory
    assert allocator_peak(run) < states.nbytes / 2


def test_initial_values_and_weight_decay():
    mask = SparseMask(30, 400, independent=True)
    assert 0.019 < mask.reward.weight.std() < 0.021 and 0.01 < mask.kl.mixer.std() < 0.03
    assert not mask.reward.bias.any() and not mask.kl.norm.bias.any()
    assert (mask.reward.norm.weight == 1).all()
    assert set(decayed(mask)) == {"reward.weight", "reward.mixer", "kl.weight", "kl.mixer"}
    assert decayed(mask)["kl.mixer"] is mask.kl.mixer
    assert set(decayed(SparseMask(2, 3))) == {"reward.weight", "reward.mixer"}


def test_states_of_another_model_are_refused():
    with pytest.raises(InputError, match=r"states of 2 layers, \(M, 4\) each, got \(3, 6, 4\)"):
        SparseMask(2, 4)(draw_states(3, 6, 4))


def test_round_trip(tmp_path):
    for number, options in enumerate((dict(independent=True, binary=True), dict(layernorm=False))):
        folder = tmp_path / str(number)
        folder.mkdir()
        mask, states = mask_of(3, 5, **options).float(), draw_states(3, 20, 5)
        save_mask(mask, folder, {"reference": "tiny"})
        again = load_mask(folder)
        assert again.settings == mask.settings
        other = mask_of(3, 5, seed=1, **options).float()
        assert not torch.equal(other(states)[0], mask(states)[0])
        load_into(other, folder)
        for loaded in (again, other):
            for found, expected in zip(loaded(states), mask(states), strict=True):
                assert torch.equal(found, expected)
    first = (folder / MASK_FILE).read_bytes()
    save_mask(mask, folder, {"reference": "tiny"})
    assert (folder / MASK_FILE).read_bytes() == first and b"tiny" in first


def test_gathered_tensors_are_written(tmp_path):
    """Of a sharded mask the caller gathers the tensors."""
    mask, whole = SparseMask(2, 4), mask_of(2, 4).float()
    save_mask(mask, tmp_path, tensors=whole.state_dict())
    assert torch.equal(load_mask(tmp_path).reward.weight, whole.reward.weight)


def test_what_is_no_such_mask_is_refused(tmp_path):
    file = tmp_path / MASK_FILE
    with pytest.raises(InputError, match="expected a learned mask, found no such file"):
        load_mask(tmp_path)
    save_mask(SparseMask(2, 4), tmp_path)
    with pytest.raises(
        InputError, match="expected a mask of num_layers 3, width 5, got num_layers 2, width 4"
    ):
        load_into(SparseMask(3, 5), tmp_path)
    with pytest.raises(
        InputError, match="expected a mask of independent True, got independent False"
    ):
        load_into(SparseMask(2, 4, independent=True), tmp_path)
    whole = file.read_bytes()
    for torn in (whole[:-8], whole[:20], b""):
        file.write_bytes(torn)
        for load in (load_mask, lambda folder: load_into(SparseMask(2, 4), folder)):
            with pytest.raises(InputError, match="cannot be read"):
                load(tmp_path)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(InputError, match="expected a learned mask, found weight"):
        load_mask(tmp_path)
    about = {"mask": SparseMask(2, 4).settings}
    save_file({"weight": torch.ones(2)}, file, metadata={"sepo": json.dumps(about)})
    with pytest.raises(InputError, match=r"expected .*reward.weight.*\(2, 4\).* got .*weight"):
        load_mask(tmp_path)
    about["mask"]["clamp"] = 1
    save_file({"weight": torch.ones(2)}, file, metadata={"sepo": json.dumps(about)})
    with pytest.raises(InputError, match="expected a learned mask, got one of .*clamp"):
        load_mask(tmp_path)
