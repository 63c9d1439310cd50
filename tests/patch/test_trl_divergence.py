"""sepo.patch.trl: TRL's distillation gives the same losses, gradients and metrics on this head."""

import pytest
import torch
from tiny import V, tiny_model

from sepo import ops, patch
from sepo.errors import InputError
from sepo.patch._trl_divergence import Divergence

pytest.importorskip("trl")
pytest.importorskip("datasets")
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402
from trl_runs import assert_same_run, train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def calls(monkeypatch):
    """In which direction our operation is called, and for how many rows."""
    seen, called = [], ops.selected_logprob_kl

    def spy(hidden, weight, ref_hidden, ref_weight, rows, *args, direction, **how):
        seen.append((direction, len(rows)))
        heads = hidden, weight, ref_hidden, ref_weight
        return called(*heads, rows, *args, direction=direction, **how)

    monkeypatch.setattr(ops, "selected_logprob_kl", spy)
    return seen


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "beta"), [("llama", 0.0), ("qwen2", 0.5), ("gemma2", 1.0)])
def test_the_same_run(tmp_path, calls, arch, beta):
    """One weight for both ends; two heads of different caps."""
    runs = []
    for patched in (True, False):
        model = tiny_model(arch, **(dict(final_logit_softcapping=2.0) if arch == "gemma2" else {}))
        runs.append(train(tmp_path, "distillation", patched, model=model, beta=beta))
    assert_same_run(*runs)
    assert len(calls) == 2
    wanted = {0.0: "ref||policy", 0.5: ("jsd", 0.5), 1.0: "policy||ref"}[beta]
    assert {direction for direction, _ in calls} == {wanted}


def test_adapters_in_the_trunk(tmp_path, calls):
    from peft import LoraConfig

    runs = []
    for patched in (True, False):
        torch.manual_seed(0)
        lora = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights=False
        )
        how = dict(model=tiny_model("qwen2"), peft_config=lora)
        runs.append(train(tmp_path, "distillation", patched, **how))
    assert_same_run(*runs)
    assert len(calls) == 2 and all("lora" in name for name in runs[0].gradients[0])


def test_rows_of_completions_alone(calls):
    """TRL takes all positions on a CPU; its loss, its entropy and its number of tokens stay."""
    states, teacher_states = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    heads, mask = student_and_teacher(), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0] * 5])
    weights = heads[1], heads[4]

    def loss_of():
        args = states.clone().requires_grad_(), teacher_states, *weights, mask, 0.0
        found = distillation_trainer._chunked_divergence_loss(*args, temperature=0.7)
        return *found, *torch.autograd.grad(found[0], (args[0], weights[0]))

    theirs = loss_of()
    assert not calls
    with patch.trl():
        ours = loss_of()
    assert calls == [("ref||policy", 6)]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- the function alone --------------------------------------------------------------------------


HEADS = {  # temperature; the student's scale and cap, the teacher's
    "plain": (1.0, 1.0, None, 1.0, None),
    "temperature": (0.7, 1.0, None, 1.0, None),
    "scales": (1.0, 0.5, None, 2.0, None),
    "the student's cap": (1.0, 1.0, 2.0, 1.0, None),
    "all": (1.3, 0.5, 4.0, 2.0, 3.0),
}


def student_and_teacher(bias=False, rows=37, dtypes=(torch.float32, torch.float32)):
    """Two heads on states of their own; the teacher's are wider."""
    torch.manual_seed(0)
    found = []
    for D, dtype in zip((16, 16 + 8 * bias), dtypes, strict=True):
        tensors = torch.randn(rows, D), torch.randn(V, D) / 2, torch.randn(V) if bias else None
        found += [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", HEADS)
def test_what_trls_function_returns(case, beta, bias):
    heads = student_and_teacher(bias)
    results = []
    for function in (Divergence, ChunkedDivergenceFunction):
        kl, entropy = function.apply(*heads, beta, *HEADS[case])
        assert kl.dtype == entropy.dtype == torch.float32
        assert kl.requires_grad and not entropy.requires_grad
        loss = (torch.linspace(-1, 1, len(kl)) * kl).sum()
        given = [x for x in heads if x is not None]  # the teacher's have no gradient
        results.append((kl, entropy, torch.autograd.grad(loss, given, allow_unused=True)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_of_two_dtypes(autocast):
    """Both functions multiply what they are given, and round no logit."""
    heads = student_and_teacher(dtypes=(torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = (
            function.apply(*heads, 0.0) for function in (Divergence, ChunkedDivergenceFunction)
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_row_at_all():
    heads = student_and_teacher(rows=0)
    kl, entropy = Divergence.apply(*heads, 1.0)
    assert len(kl) == len(entropy) == 0
    assert not any(g.any() for g in torch.autograd.grad(kl.sum(), heads[:2]))


# --- on, off, and refused ------------------------------------------------------------------------


def symbols():
    return distillation_trainer.ChunkedDivergenceFunction, distillation_trainer._use_triton


def test_on_and_off():
    before = symbols()
    with patch.trl():
        assert symbols()[0] is Divergence and symbols()[1] is not before[1]
    assert symbols() == before


def test_patched_by_others(monkeypatch):
    class Theirs:
        pass

    monkeypatch.setattr(distillation_trainer, "ChunkedDivergenceFunction", Theirs)
    message = r"^trl is patched by others: expected its own ChunkedDivergence\w+, got .*Theirs$"
    with pytest.raises(InputError, match=message):
        patch.trl()


def test_shards_of_zero_are_refused(monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True
    )
    with pytest.raises(InputError, match="expected whole weights, got DeepSpeed ZeRO-3's shards$"):
        Divergence.apply(*student_and_teacher(), 0.0)
