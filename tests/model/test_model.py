"""What prepare_model serves and what it refuses; heads, adapters, the choice of an attention."""

import numpy as np
import peft
import pytest
import torch
from dense import dense_token_logprob, random_triples
from packed_runs import TRIPLES, packed, run_dense, with_lora
from plain_attention import serve_varlen_anywhere
from tiny import V, tiny_model

from sepo import attention
from sepo.attention import layout
from sepo.data import all_positions, pack, truncate
from sepo.errors import InputError
from sepo.model import prepare
from sepo.model.forward import head, token_logprob
from sepo.model.load import load_model
from sepo.model.prepare import explain_attention, prepare_model

# peft 0.21 asks transformers 5.23 in words of before
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def varlen_anywhere(monkeypatch):
    serve_varlen_anywhere(monkeypatch)


def test_a_batch_without_pairs_reaches_every_parameter():
    model = prepare_model(tiny_model("llama"))
    logp = token_logprob(model, pack([]))
    assert logp.shape == (0,)
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "own"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("mistral", "sdpa"),
        ("gpt2", "sdpa"),
        ("gemma2", "eager"),
    ],
)
def test_any_other_call_is_the_models_own(arch, own):
    """With the attention that it had, padding and sliding windows included; a batch gets ours back."""
    plain, model = (tiny_model(arch, attn_implementation=own) for _ in range(2))
    ids = torch.arange(14).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = tiny_model(arch)
    expected = prepare_model(expected)(batch=packed())
    prepare_model(model)
    for _ in range(2):
        found = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(found, plain(input_ids=ids, attention_mask=mask).logits)
        assert model.config._attn_implementation == plain.config._attn_implementation
        torch.testing.assert_close(model(batch=packed()), expected, rtol=0, atol=2e-4)
        made = (m.generate(ids, attention_mask=mask, max_new_tokens=4) for m in (model, plain))
        assert torch.equal(*made)


def test_a_layer_alone_still_wants_a_batch():
    model = prepare_model(tiny_model("llama"))
    with pytest.raises(InputError, match="no PackedBatch reached the attention"):
        model.model(input_ids=torch.arange(5)[None])


def test_preparing_again_elsewhere_keeps_the_models_own_attention():
    model = prepare_model(tiny_model("llama"))
    model.packed_checked = frozenset()  # as on another device
    prepare_model(model)
    model(input_ids=torch.arange(5)[None])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arch", "overrides", "reason"),
    [
        (
            "cohere2",
            dict(layer_types=["chunked_attention"] * 2),
            "layers of type chunked_attention",
        ),
        ("gpt2", dict(add_cross_attention=True), "cross attention"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
            r"rotary embedding \(dynamic\)",
        ),
        ("bloom", dict(n_head=4), "attention interface"),
    ],
)
def test_refused_by_name(arch, overrides, reason):
    model = tiny_model(arch, **overrides)
    with pytest.raises(InputError, match=f"{type(model).__name__} is not supported: .*{reason}"):
        prepare_model(model)


def test_a_transform_that_no_name_gives_away_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.01)
    with pytest.raises(InputError, match="differ from its own by"):
        prepare_model(model)


def test_scaled_logits_are_read_from_the_config():
    assert head(tiny_model("granite", logits_scaling=4.0)).scale == 0.25
    prepare_model(tiny_model("granite", logits_scaling=4.0))  # compares with the model itself


def test_a_head_that_is_not_one_matrix_is_refused():
    model = tiny_model("qwen2")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="expected an nn.Linear head, got Sequential"):
        prepare_model(model)


def test_a_prepared_model_is_not_probed_again(monkeypatch):
    model = prepare_model(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(
        "sepo.model.prepare._check_against_itself", lambda *_: pytest.fail("probed")
    )
    assert prepare_model(model).config._attn_implementation == attention.ATTENTION


def test_a_copy_of_a_prepared_model_uses_its_own_weights():
    import copy

    model = prepare_model(tiny_model("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    triples = random_triples(np.random.default_rng(0), pairs=1, vocab_size=V)
    whole = lambda response: truncate(response, all_positions(len(response)))
    batch = pack([(p, whole(c), whole(r)) for p, c, r in triples])
    torch.testing.assert_close(
        twin(batch=batch), torch.full((len(batch.targets),), -np.log(V), dtype=torch.float32)
    )


def test_a_saved_prepared_model_loads_anywhere(tmp_path):
    prepare_model(tiny_model("llama")).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_loaded_model_is_prepared_by_its_first_batch(tmp_path, monkeypatch):
    """Where it is by then; any other call is the model's own before and after."""
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    expected = prepare_model(tiny_model("llama"))(batch=packed())
    compared = count_comparisons(monkeypatch)
    model, ids = load_model(str(tmp_path), attn_impl="sdpa"), torch.arange(6)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert compared == []
    for _ in range(2):
        torch.testing.assert_close(model(batch=packed()), expected, rtol=0, atol=2e-4)
        assert compared == [(model, "sdpa")]
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_loaded_model_that_is_not_served_says_so_at_its_first_batch(tmp_path):
    tiny_model("bloom", n_head=4).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not supported: .*attention interface"):
        load_model(str(tmp_path))(batch=packed())


def count_comparisons(monkeypatch) -> list:
    """Filled with each model that is compared with itself, and the attention."""
    compared, check = [], prepare._check_against_itself
    monkeypatch.setattr(
        prepare, "_check_against_itself", lambda *given: compared.append(given) or check(*given)
    )
    return compared


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(InputError, match="can't load a model from .*nowhere"):
        load_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("prepared_first", [False, True])
def test_lora_before_or_after_preparing(prepared_first):
    model = tiny_model("llama", dtype=torch.float64)
    if prepared_first:
        prepare_model(model)
    model = with_lora(model)
    if not prepared_first:
        assert prepare_model(model) is model
    expected = run_dense("llama", torch.float64, lora=True)[0]
    for logp in (model(batch=packed()), token_logprob(model, packed())):
        torch.testing.assert_close(logp.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prepared_first", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("qwen2", dict(target_modules=["q_proj", "lm_head"])),
        ("qwen2", dict(modules_to_save=["lm_head"])),
        ("llama", dict(modules_to_save=["embed_tokens"])),
        ("llama", dict(target_modules=["q_proj", "embed_tokens"])),
        ("llama", dict(trainable_token_indices=[3])),
    ],
    ids=str,
)
def test_an_adapter_on_the_head_is_refused(arch, options, prepared_first):
    model = tiny_model(arch)
    if prepared_first:
        prepare_model(model)
    model = with_lora(model, **options)
    with pytest.raises(InputError, match="an adapter on the head is not supported"):
        token_logprob(model, packed()) if prepared_first else prepare_model(model)


def test_an_adapter_on_an_untied_embedding_is_served():
    options = dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = prepare_model(with_lora(tiny_model("qwen2", dtype=torch.float64), **options))
    logp = model(batch=packed())
    model.set_attn_implementation("sdpa")
    expected = [dense_token_logprob(model, p, y) for p, c, r in TRIPLES for y in (c, r)]
    torch.testing.assert_close(logp, torch.cat(expected), rtol=0, atol=1e-10)


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(InputError, match="PROMPT_TUNING adapters put tokens"):
        prepare_model(model)


def test_a_quantised_head_is_refused():
    model = tiny_model("qwen2")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), False)
    with pytest.raises(InputError, match=r"quantised weight \(Parameter of torch.uint8\)"):
        prepare_model(model)


def test_a_window_that_only_the_mask_knows_is_refused(monkeypatch):
    model = tiny_model("mistral", sliding_window=100)  # longer than what is compared
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(
            **model.config.to_dict() | dict(sliding_window=None)
        )
        layer.self_attn.config._attn_implementation = "eager"
    monkeypatch.setattr(
        type(model), "set_attn_implementation",
        lambda self, name: [
            setattr(m.config, "_attn_implementation", name)
            for m in (self, *(layer.self_attn for layer in self.model.layers))
        ],
    )  # fmt: skip
    with pytest.raises(InputError, match="do not tell the attention their sliding windows"):
        prepare_model(model)


def test_an_unknown_or_absent_attention_is_refused_before_loading():
    for name in ("flash", "varlen"):
        with pytest.raises(InputError, match="attn_impl"):
            load_model("/nowhere", attn_impl=name)
    with pytest.raises(InputError, match="one of auto, varlen, .*sdpa, got flash"):
        prepare_model(tiny_model("llama"), attn_impl="flash")


def test_the_wish_is_kept_and_chosen_where_it_runs():
    model = prepare_model(tiny_model("llama"), attn_impl="flex")
    assert prepare_model(model) is model
    with pytest.raises(InputError, match="attn_impl=flex cannot run here: torch has no Flex"):
        model(batch=packed())
    prepare_model(model, attn_impl="sdpa")
    model(batch=packed()).sum().backward()
    assert explain_attention(model) == "sdpa, as asked"
    assert explain_attention(tiny_model("gemma2")).startswith("sdpa; not varlen: it needs a CUDA")


@pytest.mark.parametrize("attn_impl", ["sdpa", "varlen"])
def test_autocast_widens_nothing(attn_impl, varlen_anywhere, monkeypatch):
    """Rotary embeddings hand on float32 queries and keys beside bfloat16 values."""
    model = prepare_model(tiny_model("llama"), attn_impl=attn_impl)
    asked = []
    choose = layout.choose
    monkeypatch.setattr(layout, "choose", lambda n, terms: asked.append(terms) or choose(n, terms))
    with torch.autocast("cpu", torch.bfloat16):
        logp = model(batch=packed())
    assert [terms.dtype for terms in asked] == [torch.bfloat16]
    exact = run_dense("llama", torch.float32)[0]
    assert logp.dtype == torch.float32
    assert 1e-4 < (logp - exact).abs().max() < 0.2


def test_attention_dropout_of_a_model_in_training():
    model = prepare_model(tiny_model("llama", attention_dropout=0.3)).train()
    assert not torch.equal(model(batch=packed()), model(batch=packed()))
    assert torch.equal(model.eval()(batch=packed()), model(batch=packed()))
