"""sepo.patch: what it replaces comes back, and what it does not know is refused by name."""

import copy
import inspect
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from tiny import V, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sepo import ops, patch
from sepo.errors import InputError
from sepo.patch import _replace, _transformers

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
LABELS = torch.tensor([[-100, -100, 5, 6], [-100, 8, -100, 1]])


def own_logp(model) -> torch.Tensor:  # of the labels, in order
    logp = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    rest = LABELS[:, 1:]
    return logp.gather(-1, rest.clamp(min=0)[..., None])[..., 0][rest != -100]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt_neox", "gpt2", "gemma2"])
def test_labels_in_log_probabilities_out(arch):
    model = tiny_model(arch)
    expected, own = own_logp(model), model.forward
    with patch.transformers(model) as applied:
        assert isinstance(applied, patch.Patch)
        found = model(input_ids=IDS, selected_labels=LABELS)
        assert type(found) is patch.LabelLogprob
        torch.testing.assert_close(found.logp, expected)
        assert found.cu_rows.tolist() == [0, 2, 4]
        assert torch.equal(own_logp(model), expected)  # any other call is the model's own
    assert "forward" not in vars(model) and model.forward == own


def test_models_whose_logits_are_scaled():
    for arch, more in (("granite", dict(logits_scaling=4.0)), ("cohere", dict(logit_scale=0.5))):
        model = tiny_model(arch, **more)
        expected = own_logp(model)
        with patch.transformers(model):
            torch.testing.assert_close(model(IDS, selected_labels=LABELS).logp, expected)


def test_modes_are_as_they_were():
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    patch.transformers(model)
    assert [module.training for module in model.modules()] == before and len({*before}) == 2


def test_the_signature_is_the_models_own():
    """Trainer reads from it which columns a model wants."""
    model = tiny_model()
    own = inspect.signature(model.forward)
    with patch.transformers(model):
        assert inspect.signature(model.forward) == own


def test_a_deep_copy_runs_its_own_weights():
    model = tiny_model()
    with patch.transformers(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        expected = own_logp(other)
        torch.testing.assert_close(other(IDS, selected_labels=LABELS).logp, expected)
        assert (expected - own_logp(model)).abs().max() > 0.1


def test_a_forward_that_others_replaced():
    """accelerate puts functions, not methods, in the place of forward."""
    model = tiny_model()
    expected, own, calls = own_logp(model), model.forward, []
    model.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    theirs = model.forward
    with patch.transformers(model):
        torch.testing.assert_close(model(IDS, selected_labels=LABELS).logp, expected)
        before = len(calls)
        own_logp(model)
        assert len(calls) == before + 1
    assert model.forward is theirs


def test_nothing_of_others_is_lost():
    model = tiny_model()
    applied = patch.transformers(model)
    ours = model.forward
    model.forward = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    message = "LlamaForCausalLM.forward: expected what this patch put there, got another's"
    with pytest.raises(InputError, match=message):
        applied.undo()
    assert model.forward is theirs
    model.forward = ours
    applied.undo()
    applied.undo()
    assert "forward" not in vars(model)


def test_several_places_come_back_in_turn():
    """What patching a library's symbols needs: modules and classes, one after the other."""
    module = SimpleNamespace(head="theirs")
    kind = type("Kind", (), {"loss": "theirs"})
    applied = _replace.Patch()
    with applied:
        applied.replace(module, "head", "ours")
        applied.replace(module, "head", "ours")
        applied.replace(kind, "loss", "ours")
        applied.replace(kind, "new", "ours")
        assert (module.head, kind.loss, kind.new) == ("ours",) * 3
    assert (module.head, kind.loss) == ("theirs", "theirs") and not hasattr(kind, "new")


# --- refusals, one line each ---------------------------------------------------------------------


def encoder_decoder():
    config = AutoConfig.for_model(
        "t5", vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


def with_a_deeper_head():
    model = tiny_model("qwen2")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    return model


def with_unknown_logits():
    """A model whose forward does to its logits what no setting says."""
    model = tiny_model()
    own = type(model).forward

    class Sharper(type(model)):
        def forward(self, *args, **kwargs):
            found = own(self, *args, **kwargs)
            found.logits = found.logits * 1.5
            return found

    model.__class__ = Sharper
    return model


def patched_before():
    model = tiny_model()
    patch.transformers(model)
    return model


REFUSALS = {
    "patched already": (patched_before, "LlamaForCausalLM is patched already: expected a model"),
    "encoder": (encoder_decoder, "T5ForConditionalGeneration is not supported: expected a decoder"),
    "no language model": (
        lambda: torch.nn.Linear(2, 2),
        "Linear is not supported: expected a tran",
    ),
    "deeper head": (with_a_deeper_head, "Qwen2ForCausalLM: expected an nn.Linear head, got Sequen"),
    "unknown logits": (with_unknown_logits, "Sharper is not supported: log-probabilities .* nats$"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_models_that_are_refused(case):
    make, message = REFUSALS[case]
    model = make()
    before = dict(vars(model))
    with pytest.raises(InputError, match=message) as refused:
        patch.transformers(model)
    assert "\n" not in str(refused.value) and vars(model) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's
def test_adapters_that_are_refused():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    def adapted(config):
        return get_peft_model(tiny_model("qwen2"), config)

    prompts = adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="PROMPT_TUNING adapters put tokens or keys before"):
        patch.transformers(prompts)
    with pytest.raises(InputError, match="an adapter on the head is not supported"):
        patch.transformers(adapted(LoraConfig(target_modules=["lm_head"], r=2)))


@pytest.mark.parametrize(
    ("version", "refused"),
    [("5.16.9", True), ("5.17.0", False), ("5.24.0.dev0", False), ("6.0.0.dev0", True)],
)
def test_versions(monkeypatch, version, refused):
    monkeypatch.setattr(metadata, "version", lambda package: version)
    if not refused:
        patch.transformers(tiny_model())
        return
    message = (
        f"^transformers {version} is not known to sepo.patch: expected transformers >=5.17,<6$"
    )
    with pytest.raises(InputError, match=message):
        patch.transformers(tiny_model())


def test_a_package_that_is_missing():
    with pytest.raises(
        InputError, match=r"^expected no-such-package ==1.16.\*, got none installed$"
    ):
        _replace.check_version("no-such-package", "==1.16.*")


def test_a_model_on_no_device_is_not_run():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    with patch.transformers(model):
        assert _transformers.is_patched(model)


def test_labels_that_are_refused():
    model = tiny_model()
    with patch.transformers(model):
        with pytest.raises(ValueError, match=r"expected labels \(B, T\) int64, got \(4,\)"):
            model(IDS, selected_labels=LABELS[0])
        with pytest.raises(ValueError, match=f"expected 0 <= targets < {V}, got {V}"):
            model(IDS, selected_labels=LABELS.masked_fill(LABELS == 8, V))


def test_gradients_are_those_of_the_logits():
    models = [tiny_model(dtype=torch.float64) for _ in range(2)]
    own_logp(models[0]).sum().backward()
    with patch.transformers(models[1]):
        logp, cu_rows = models[1](IDS, selected_labels=LABELS)
        ops.segment_sum(logp, cu_rows).sum().backward()
    for theirs, ours in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
