"""sepo.patch.trl: TRL's trainers give the same losses, gradients and metrics on this head."""

import importlib
from importlib import metadata

import pytest
import torch
from processes import ROOT, run
from tiny import V, tiny_model

from sepo import ops, patch
from sepo.errors import InputError
from sepo.patch._trl_head import LabelStatistics

pytest.importorskip("trl")
pytest.importorskip("datasets")
from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: E402
from trl_runs import KINDS, assert_same_run, train, trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


MODELS = {
    "llama": {},  # one weight for both ends
    "qwen2": {},
    "gemma2": dict(final_logit_softcapping=2.0),
    "phi": {},  # a bias on the head
    "granite": dict(logits_scaling=4.0),
    "cohere": dict(logit_scale=0.5),
}


def made(arch="llama"):
    model = tiny_model(arch, **MODELS[arch])
    if arch == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture
def rows(monkeypatch):
    """How many rows go through our head, call by call."""
    seen = []
    for name in ("selected_logprob", "selected_stats"):
        called = getattr(ops, name)

        def count(hidden, weight, rows, *args, called=called, **how):
            seen.append(len(rows))
            return called(hidden, weight, rows, *args, **how)

        monkeypatch.setattr(ops, name, count)
    return seen


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run(tmp_path, kind, arch):
    expected = train(tmp_path, kind, False, model=made(arch))
    assert_same_run(train(tmp_path, kind, True, model=made(arch)), expected)


@pytest.mark.parametrize("arch", ["phi", "granite", "cohere"])
@pytest.mark.parametrize("kind", ["sft", "rloo"])
def test_heads_with_a_bias_or_a_scale(tmp_path, kind, arch):
    expected = train(tmp_path, kind, False, model=made(arch))
    assert_same_run(train(tmp_path, kind, True, model=made(arch)), expected)


OPTIONS = {
    "the entropy is rewarded": ("grpo", dict(entropy_coef=0.3)),
    "tokens of high entropy alone": ("grpo", dict(top_entropy_quantile=0.4)),
    "several updates of one rollout": ("grpo", dict(num_iterations=2, epsilon=0.2)),
    "pairs weighted by their probability": ("dpo", dict(use_weighting=True)),
    "a reference computed before": ("dpo", dict(precompute_ref_log_probs=True)),
    "layers that are not computed again": ("dpo", dict(activation_checkpointing=False)),
    "layers computed again, the old way": (
        "sft", dict(activation_checkpointing_kwargs={"use_reentrant": True}),
    ),
    "accumulated": ("sft", dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)),
    "a loss of its own": ("sft", dict(loss_type="dft")),
    "no padding": ("sft", dict(padding_free=True, max_length=None)),
    "evaluated": ("dpo", dict(eval_strategy="steps", eval_steps=1)),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_the_same_run_by_other_options(tmp_path, case):
    kind, how = OPTIONS[case]
    expected = train(tmp_path, kind, False, **how)
    assert_same_run(train(tmp_path, kind, True, **how), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_the_trunk(tmp_path, kind):
    from peft import LoraConfig

    def run(patched):
        torch.manual_seed(0)
        lora = LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False
        )
        return train(tmp_path, kind, patched, model=made("qwen2"), peft_config=lora)

    found, expected = run(True), run(False)
    assert all("lora" in name for name in expected.gradients[0])
    assert_same_run(found, expected)


def test_rows_with_a_label_alone(tmp_path, rows):
    """TRL takes all positions on a CPU, and a sequence is mostly prompt and padding."""
    with patch.trl():
        for kind in ("sft", "dpo"):
            made = trainer(tmp_path, kind)
            batch = next(iter(made.get_train_dataloader()))
            labelled = batch["labels"] != -100 if kind == "sft" else batch["completion_mask"]
            rows.clear()
            made.compute_loss(made.model, dict(batch))
            assert rows == [labelled[:, 1:].sum()] * (1 if kind == "sft" else 2)
            assert rows[0] < 0.7 * batch["input_ids"].numel()


def test_the_entropys_gradient_is_asked_for_at_once(tmp_path, monkeypatch):
    """GRPO's trainer knows whether it rewards the entropy; the rest of them only logs it."""
    asked, called = [], ops.selected_stats
    spy = lambda *args, entropy_grad, **how: (
        asked.append(entropy_grad) or called(*args, entropy_grad=entropy_grad, **how)
    )
    monkeypatch.setattr(ops, "selected_stats", spy)
    for coefficient, expected in ((0.3, {True}), (0.0, {False})):
        asked.clear()
        train(tmp_path, "grpo", True, entropy_coef=coefficient)
        assert {*asked} == expected


@pytest.mark.slow
def test_two_processes(tmp_path):
    """DDP, gloo: each rank compares its runs on our head with its runs on TRL's."""
    run(ROOT / "tests/workers/trl_ranks.py", tmp_path, ranks=2)
    assert sorted(path.name for path in tmp_path.glob("same-*")) == ["same-0", "same-1"]


# --- the function alone --------------------------------------------------------------------------


OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HEADS = {
    "plain": {},
    "bias": dict(bias=True),
    "temperature": dict(temperature=0.7),
    "scale": dict(scale=0.3, bias=True),
    "cap": dict(softcap=2.0),
    "all": dict(bias=True, temperature=1.7, softcap=3.0, scale=0.5),
}


def head_of(dtype=torch.float32, *, M=37, bias=False):
    torch.manual_seed(0)
    tensors = [torch.randn(M, 16), torch.randn(V, 16) / 2, torch.randn(V) if bias else None]
    tensors = [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
    return tensors, torch.randint(V, (M,))


def results(function, tensors, targets, *, temperature=1.0, softcap=None, scale=1.0, entropy=0.5):
    """The five results of TRL's function or of ours, and the gradients of the tensors."""
    found = function.apply(*tensors, targets, temperature, 32, softcap, scale, OUTPUTS)
    weights = torch.linspace(-1, 1, len(targets))
    loss = (weights * found[0]).sum()
    if entropy:
        loss = loss + entropy * (weights.flip(0) * found[1]).sum()
    given = [x for x in tensors if x is not None]
    return tuple(found), torch.autograd.grad(loss, given)


@pytest.mark.parametrize("entropy", [0.0, 0.5])
@pytest.mark.parametrize("case", HEADS)
def test_what_trls_function_returns(case, entropy):
    how = dict(HEADS[case])
    tensors, targets = head_of(bias=how.pop("bias", False))
    found, gradients = results(LabelStatistics, tensors, targets, entropy=entropy, **how)
    expected, theirs = results(ChunkedLogProbFunction, tensors, targets, entropy=entropy, **how)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert [x.requires_grad for x in found] == [x.requires_grad for x in expected]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, theirs, rtol=1e-5, atol=1e-5)


def test_what_nobody_asked_for_is_none():
    tensors, targets = head_of()
    for outputs in (("log_probs",), ("log_probs", "entropy"), ("is_top1", "mean_logits")):
        found, expected = (
            function.apply(*tensors, targets, 1.0, 32, None, 1.0, outputs)
            for function in (LabelStatistics, ChunkedLogProbFunction)
        )
        assert [x is None for x in found] == [x is None for x in expected]


def test_no_label_at_all():
    tensors, targets = head_of(M=0)
    found, gradients = results(LabelStatistics, tensors, targets)
    assert [len(x) for x in found] == [0] * 5 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_no_further_from_the_truth_than_trls(how):
    """In bfloat16 TRL rounds its logits; against the same inputs in float64."""
    tensors, targets = head_of(torch.float32 if how == "autocast" else torch.bfloat16, M=200)
    exact = [None if x is None else x.detach().bfloat16().double() for x in tensors]
    exact = [None if x is None else x.requires_grad_() for x in exact]
    logits = exact[0] @ exact[1].T
    logp = logits.log_softmax(-1)
    chosen, entropy = logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    truth = (chosen, entropy, (2 * logp).logsumexp(-1), logits.mean(-1))

    def errors(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = function.apply(*tensors, targets, 1.0, 32, None, 1.0, OUTPUTS)
        return [(x - y).abs().mean().item() for x, y in zip(found, truth, strict=False)]

    for ours, theirs in zip(errors(LabelStatistics), errors(ChunkedLogProbFunction), strict=True):
        assert ours <= theirs


# --- on, off, and refused ------------------------------------------------------------------------


def symbols():
    utils = importlib.import_module("trl.trainer.utils")
    names = ("_ChunkedLogProbFunction", "_use_triton", "add_fused_lm_head")
    modules = [importlib.import_module(f"trl.trainer.{kind}_trainer") for kind in KINDS]
    grpo = modules[KINDS.index("grpo")].GRPOTrainer._get_per_token_logps_and_entropies
    return [getattr(utils, n) for n in names] + [m.add_fused_lm_head for m in modules] + [grpo]


def test_it_can_be_undone():
    before = symbols()
    with patch.trl() as applied:
        assert isinstance(applied, patch.Patch)
        assert not any(a is b for a, b in zip(symbols(), before, strict=True))
    assert symbols() == before
    applied = patch.trl()
    applied.undo()
    applied.undo()
    assert symbols() == before


def test_trainers_made_before_and_after(tmp_path, rows):
    """The head is looked up at every call."""
    made = trainer(tmp_path, "dpo")
    batch = next(iter(made.get_train_dataloader()))
    step = lambda: made.compute_loss(made.model, batch)
    theirs = step()
    assert not rows
    with patch.trl():
        torch.testing.assert_close(step(), theirs, rtol=1e-5, atol=0)
        assert len(rows) == 2
    assert torch.equal(step(), theirs) and len(rows) == 2


def test_applied_twice():
    message = r"^trl is patched already: expected TRL's own head, got sepo.patch's$"
    with patch.trl():
        before = symbols()
        with pytest.raises(InputError, match=message):
            patch.trl()
        assert symbols() == before


def test_patched_by_others(monkeypatch):
    class Theirs:
        pass

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Theirs)
    before = symbols()
    message = r"^trl is patched by others: expected its own ChunkedLogProbFunction, got .*Theirs$"
    with pytest.raises(InputError, match=message):
        patch.trl()
    assert symbols() == before


@pytest.mark.parametrize("version", ["1.15.3", "1.17.0", "2.0.0.dev0"])
def test_versions_that_are_not_known(monkeypatch, version):
    before = symbols()
    monkeypatch.setattr(metadata, "version", lambda package: version)
    message = rf"^trl {version} is not known to sepo.patch: expected trl ==1.16.\*$"
    with pytest.raises(InputError, match=message):
        patch.trl()
    assert symbols() == before


HEAD_ADAPTERS = {
    "lora": (dict(target_modules=["q_proj", "lm_head"]), ValueError, "adapter to `lm_head`"),
    "a copy": (
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        InputError,
        "^Qwen2ForCausalLM: expected an nn.Linear head, got ModulesToSaveWrapper of peft; "
        "an adapter on the head is not supported$",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HEAD_ADAPTERS)
def test_adapters_on_the_head_are_refused(tmp_path, kind, case):
    """The first by TRL itself: no trainer of its has one."""
    from peft import LoraConfig

    options, error, message = HEAD_ADAPTERS[case]
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, **options)
    with pytest.raises(error, match=message) as refused:
        train(tmp_path, kind, True, model=made("qwen2"), peft_config=lora)
    assert "\n" not in str(refused.value)


def test_shards_of_zero_are_refused(monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True
    )
    tensors, targets = head_of()
    with pytest.raises(InputError, match="expected whole weights, got DeepSpeed ZeRO-3's shards$"):
        results(LabelStatistics, tensors, targets)


def test_beside_ligers_layers(tmp_path, monkeypatch, rows):
    """`use_liger_kernel` gives the layers to Liger, whose kernels need a GPU, and the head to us."""
    seen = []
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel", lambda model, config: seen.append(config)
    )
    found = train(tmp_path, "dpo", True, use_liger_kernel=True)
    assert seen == [{"fused_linear_cross_entropy": False}] and len(rows) == 4
    assert_same_run(found, train(tmp_path, "dpo", False))


def test_ligers_fused_cross_entropy_is_refused_by_trl(tmp_path):
    head = dict(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    with pytest.raises(ValueError, match="fused_linear_cross_entropy.*is not supported"):
        train(tmp_path, "dpo", True, **head)
