"""The cost model is what torch counts of real steps, and its hours are sums that a hand can check."""

import numpy as np
import pytest
import torch
import torch.utils.flop_counter as counter
from bench_jobs import COUNTED
from tiny import V, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.steps import ours, savings
from bench.steps.models import SHAPES as REAL
from bench.steps.models import Weights, twin
from bench.steps.objectives import SETTINGS
from bench.steps.pairs import drawn_pairs, with_scores
from sepo import SePOConfig, SePOTrainer
from sepo.attention import layout
from sepo.cost.decoder import SHAPES, Decoder, named
from sepo.cost.work import Schedule, step_work, total
from sepo.data.segments import make_segments, num_selected
from sepo.data.selection import Selection
from sepo.errors import InputError
from sepo.model import reads
from sepo.model.kept import kept_logprob
from sepo.trainer.methods import METHODS

aten = torch.ops.aten
# torch has no formula for its attention on a CPU: the one of its kernels for GPUs
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: counter.sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: counter.sdpa_backward_flop_count(g, q, k, v)
    ),
}
MODELS = {
    "llama": {},
    "gpt_neox": {},
    "qwen3": {},  # heads wider than the model, weights tied
    "smollm2": dict(REAL["smollm2-shape"], num_hidden_layers=2, vocab_size=1009),
}
ALL_SAVINGS = [saving.name for saving in savings.SAVINGS]


@pytest.fixture(autouse=True)
def attention_that_is_counted(monkeypatch):
    """The native kernel, which some CPUs have in float32 too, does the same work unseen."""
    (sdpa,) = (impl for impl in layout.IMPLS if impl.name == "sdpa")
    monkeypatch.setattr(layout, "IMPLS", (sdpa,))


def small(name: str) -> Weights:
    return Weights(tiny_model("llama" if name == "smollm2" else name, **MODELS[name]))


def drawn(weights: Weights) -> list:
    pairs = drawn_pairs(5, weights.model.config.vocab_size, 48)
    return [with_scores(pair) for pair in pairs]


def counted(step) -> int:
    with counter.FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as mode:
        step()
    return mode.get_total_flops()


def modelled(decoder: Decoder, triples: list, schedule: Schedule) -> float:
    sizes = [(len(p), len(c.response), len(r.response)) for p, c, r in triples]
    used = sum(map(num_selected, triples))
    return total(step_work(decoder, np.array(sizes), used, schedule)).flop


@pytest.mark.parametrize(
    "arch, saving",
    [("llama", saving) for saving in ALL_SAVINGS]
    + [(arch, saving) for arch in MODELS if arch != "llama" for saving in ("unpacked", "fused")],
)
@COUNTED
def test_flop_of_every_saving_are_what_torch_counts(arch, saving):
    weights = small(arch)
    pairs = drawn(weights)
    (contender,) = (
        c
        for c in savings.contenders(weights, [pairs], bf16=False, objectives=("sepo",))
        if c.name == f"sepo: {saving}"
    )
    cut = [make_segments(pair, Selection("selected", fraction=0.3)) for pair in pairs]
    whole = saving in ("unpacked", "packed", "shared")
    schedule = Schedule(
        packed=saving != "unpacked",
        prompt_once=saving not in ("unpacked", "packed"),
        selected=saving in ("selected", "fused"),
        hidden_scores=True,  # the counter takes squares
    )
    triples = savings.untruncated(cut, pairs) if whole else cut
    found = modelled(Decoder.of(weights.model), triples, schedule)
    assert counted(lambda: contender.run(0)) == pytest.approx(found, rel=1e-12)


STEPS = {  # of the trainer: method, what it is given, the schedule
    "sepo": ("sepo", {}, {}),
    "checkpointing": ("sepo", dict(checkpointing=True), dict(checkpointing=True)),
    "cheap again": ("sepo", dict(selective=True), dict(recompute_cheap=True)),
    "logits again": ("sepo", dict(head_budget=64 * V), dict(head_again=True)),
    "dpo, cached": ("dpo", dict(reference="cached"), dict(reference="cached")),
    "dpo, live": ("dpo", dict(reference="live"), dict(reference="live")),
    "dpo, live, checkpointing": (
        "dpo",
        dict(reference="live", checkpointing=True),
        dict(reference="live", checkpointing=True),
    ),
    "tdpo2, live": ("tdpo2", dict(reference="live"), dict(reference="live", kl=True)),
    "tdpo2, cached": ("tdpo2", dict(reference="cached"), dict(reference="cached", kl=True)),
    "tdpo2, logits again": (
        "tdpo2",
        dict(reference="live", head_budget=64 * V),
        dict(reference="live", kl=True, head_again=True),
    ),
    "sft": ("sft", {}, dict(responses=1)),
}


@pytest.mark.parametrize(
    "arch, step",
    [("llama", step) for step in STEPS]
    + [
        (arch, step)
        for arch in MODELS
        if arch != "llama"
        for step in ("checkpointing", "dpo, live")
    ],
)
@COUNTED
def test_flop_of_the_trainers_step_are_what_torch_counts(arch, step):
    method, given, schedule = STEPS[step]
    weights = small(arch)
    pairs = drawn(weights)
    settings = dict(SETTINGS.get(method, {}))
    options = {k: v for k, v in given.items() if k not in ("reference", "head_budget")}
    if "head_budget" in given:
        settings["head_budget"] = given["head_budget"]
    reference, kind = None, given.get("reference")
    if kind == "live":
        reference = twin(weights.reference)
    elif kind == "cached" and method == "tdpo2":
        (pairs,), reference = ours.cached(weights, [pairs])
    elif kind == "cached":
        pairs, _ = ours.reference_logp(weights, pairs)
    contender = ours.contender(
        step, method, weights, [pairs], settings, bf16=False, reference=reference, **options
    )
    assert contender.run is not None
    cut = [
        make_segments(pair, Selection(METHODS[method].positions, fraction=0.3)) for pair in pairs
    ]
    found = modelled(Decoder.of(weights.model), cut, Schedule(hidden_scores=True, **schedule))
    assert counted(lambda: contender.run(0)) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("budget", [None, 16 * V], ids=["saved", "recomputed"])
@pytest.mark.parametrize("method", ["confpo", "selective-dpo", "sepo-entropy"])
@COUNTED
def test_flop_of_a_rule_are_what_torch_counts(method, budget, monkeypatch):
    """One product at all rows and three at those kept, four where their logits do not fit."""
    seen = []

    def spy(*args, **options):
        logp, keep = kept_logprob(*args, **options)
        seen.append(keep.double().mean().item())
        return logp, keep

    monkeypatch.setattr(reads, "kept_logprob", spy)
    weights = small("llama")
    pairs = drawn(weights)
    reference = twin(weights.reference) if method == "selective-dpo" else None
    contender = ours.contender(
        "rule", method, weights, [pairs], dict(head_budget=budget), bf16=False, reference=reference
    )
    assert contender.run is not None
    found = counted(lambda: contender.run(0))
    (kept,) = seen
    assert 0.2 < kept < 0.8
    schedule = Schedule(
        hidden_scores=True,
        kept=kept,
        head_again=budget is not None,
        reference="none" if reference is None else "live",
    )
    cut = [make_segments(pair, Selection("all")) for pair in pairs]
    assert found == pytest.approx(modelled(Decoder.of(weights.model), cut, schedule), rel=1e-12)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@COUNTED
def test_adapters_cost_what_torch_counts(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(num_hidden_layers=8)
    decoder = Decoder.of(model)
    pairs = [with_scores(pair) for pair in drawn_pairs(5, V, 48)]
    config = SePOConfig(
        output_dir=str(tmp_path),
        pairs_per_step=5,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = SePOTrainer(model, config, pairs, peft_config=adapters)
    cut = [make_segments(pair, Selection("selected", fraction=0.3)) for pair in pairs]
    schedule = Schedule(frozen=True, adapter_rank=4, hidden_scores=True)
    found = modelled(decoder, cut, schedule)
    # torch leaves out what the first layer would send to the embedding
    step = lambda: trainer.training_step(trainer.model, {"step": 0})
    assert found == pytest.approx(counted(step), rel=0.03)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, all but products, attention and what only looks."""

    PRODUCTS = {"mm", "addmm", "empty", "empty_like", "detach"}

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in self.PRODUCTS or name.startswith("_scaled_dot") or func.is_view:
            return out
        tensors = lambda tree: [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        read, written = tensors((args, kwargs)), tensors(out)
        seen = {x.untyped_storage().data_ptr() for x in read}
        made = [x for x in written if x.untyped_storage().data_ptr() not in seen]
        if made or name.endswith("_"):
            # an expanded tensor is read once
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in read)
            self.bytes += sum(x.nbytes for x in (made or written))
        return out


@pytest.mark.parametrize("arch", ("llama", "gpt_neox"))
def test_norms_and_activations_move_what_eager_layers_move(arch):
    tokens = 128

    def moved(layers: int) -> tuple[Decoder, int, int]:
        sizes = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=layers)
        heads = dict(num_key_value_heads=4) if arch == "llama" else {}
        model = tiny_model(arch, dtype=torch.bfloat16, **sizes, **heads)
        model.set_attn_implementation("sdpa")
        with Traffic() as forward:
            ids = torch.zeros(1, tokens, dtype=torch.long)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        with Traffic() as backward:
            hidden.sum().backward()
        return Decoder.of(model), forward.bytes, backward.bytes

    (_, *one), (decoder, *two) = moved(1), moved(2)
    for passes, more, less in zip(decoder.passes, two, one, strict=True):
        found = decoder.elementwise(passes) / decoder.layers * tokens
        assert found == pytest.approx(more - less, rel=0.03)


def test_shapes_have_the_sizes_of_their_names():
    for name in SHAPES:
        said = float(name.rpartition("-")[2].removesuffix("B").removesuffix("M"))
        found = named(name).parameters / (1e6 if name.endswith("M") else 1e9)
        assert found == pytest.approx(said, rel=0.05), name


def test_experts_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a dense decoder, got experts"):
        Decoder.of(tiny_model("mixtral", num_local_experts=2))
    with pytest.raises(InputError, match="directory or one of Pythia-2.8B, .* got GPT-9"):
        named("GPT-9")
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert named(str(tmp_path)) == Decoder.of(tiny_model("llama"))
