"""Every change of a run that goes on: refused with its name, or allowed and said."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from continued_runs import (
    KINDS,
    PAIRS,
    base_nudged_at,
    changed,
    experts,
    first_pair,
    made,
    make,
    nudged,
)
from tiny import V, tiny_model, tiny_tokenizer

import sepo.trainer.identity
from sepo import SePOConfig, SePOTrainer
from sepo.data.store.part import TOKENS
from sepo.data.store.store import ScoredStore
from sepo.data.types import TokenPair
from sepo.errors import InputError
from sepo.model.prepare import prepare_model
from sepo.score.score import score_dataset
from sepo.trainer.checkpoints import MARK
from sepo.trainer.methods import METHODS

# peft calls transformers by a name of before
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Each kind of run, with its first checkpoint of two."""
    path = tmp_path_factory.mktemp("begun")
    for kind, arguments in KINDS.items():
        make(path / kind, **made(arguments)).train()
        shutil.rmtree(path / kind / "checkpoint-2")
    return path


other_ids = lambda ids: (ids + 1) % V
ones = lambda ids: np.ones(len(ids), np.float32)
DATA = r"data \(hash of its pairs\) [0-9a-f]{16}, got [0-9a-f]{16}"
BASE = r"base model \(hash of the weights that are not trained\) [0-9a-f]{16}, got"
REFUSED = [  # kind, the change, what is expected
    ("sepo", dict(method="sepo-rand"), "--method sepo, got sepo-rand"),
    ("cached", dict(method="ipo"), "--method dpo, got ipo"),
    ("cached", dict(beta=0.2), "--beta 0.1, got 0.2"),
    ("sepo", dict(gamma=3.0), "--gamma 2.0, got 3.0"),
    ("sepo", dict(fraction=0.5), "--fraction 0.3, got 0.5"),
    ("sepo", dict(first_token="released"), "--first_token paper, got released"),
    ("sepo", dict(pairs_per_step=2), "--pairs_per_step 4, got 2"),
    ("sepo", dict(seed=1), "seed of .* 42, got 1"),
    ("sepo", dict(data_seed=1), "seed of .* 42, got 1"),
    # data
    ("sepo", dict(pairs=PAIRS[1:]), "number of pairs 8, got 7"),
    ("cached", dict(pairs=PAIRS[::-1]), DATA),
    ("cached", dict(pairs=first_pair(prompt=other_ids(PAIRS[0].prompt))), DATA),
    ("sepo", dict(pairs=first_pair(chosen=other_ids(PAIRS[0].chosen))), DATA),
    ("live", dict(pairs=first_pair(rejected=other_ids(PAIRS[0].rejected))), DATA),
    ("lora", dict(pairs=first_pair(rejected=other_ids(PAIRS[0].rejected))), DATA),
    ("sepo", dict(pairs=first_pair(chosen_weight=ones(PAIRS[0].chosen))), DATA),
    ("sepo", dict(pairs=first_pair(id="x")), DATA),
    ("cached", dict(pairs=[*PAIRS[:-1], replace(PAIRS[-1], id="x")]), DATA),
    ("sepo", dict(pairs=first_pair(chosen_score=nudged(PAIRS[0].chosen_score))), "scores"),
    ("sepo", dict(pairs=first_pair(rejected_score=-PAIRS[0].rejected_score)), "scores"),
    # the reference
    (
        "cached",
        dict(pairs=first_pair(chosen_ref_logp=nudged(PAIRS[0].chosen_ref_logp))),
        r"reference \(hash of its log-probabilities in the data\)",
    ),
    ("cached", dict(reference=1), r"reference \(hash of its log-probabilities in the data\)"),
    ("live", dict(reference=2), r"reference \(hash of its weights\) [0-9a-f]{16}, got"),
    ("live", dict(lora={}, reference=None), BASE.replace("[0-9a-f]{16}", "None")),
    # the base model and its adapters
    ("lora", dict(model=lambda: tiny_model(seed=1)), BASE),
    ("lora", dict(model=lambda: base_nudged_at("model.norm.weight")), BASE),
    (
        "lora",
        dict(model=lambda: base_nudged_at("model.layers.1.self_attn.q_proj.weight")),
        BASE,
    ),
    ("lora", dict(lora=dict(r=4)), "adapters with r 2, got 4"),
    ("lora", dict(lora=dict(lora_alpha=8)), "adapters with lora_alpha 4, got 8"),
    ("lora", dict(lora=dict(lora_dropout=0.1)), "adapters with lora_dropout 0.0, got 0.1"),
    ("lora", dict(lora=dict(use_rslora=True)), "adapters with use_rslora False, got True"),
    (
        "lora",
        dict(lora=dict(target_modules=["q_proj", "k_proj"])),
        r"adapters with target_modules \['q_proj', 'v_proj'\], got \['k_proj', 'q_proj'\]",
    ),
    ("lora", dict(lora=None, reference=1), f"{BASE} None"),
    # precision and optimiser
    ("sepo", dict(model=lambda: tiny_model(dtype=torch.bfloat16)), "dtype of .* float32, got bfl"),
    ("sepo", dict(bf16=True), "--bf16 False, got True"),
    ("sepo", dict(optim="sgd"), "--optim adamw_torch_fused, got sgd"),
    ("sepo", dict(lr_scheduler_type="linear"), "--lr_scheduler_type constant, got linear"),
    # the same weights, another function
    ("sepo", dict(model=lambda: tiny_model(rms_norm_eps=1e-3)), "a model with rms_norm_eps 1e-06"),
    ("lora", dict(model=lambda: tiny_model(hidden_act="gelu")), "a model with hidden_act silu"),
    ("experts", dict(model=lambda: experts(router_aux_loss_coef=0.2)), "a model with router_aux_l"),
    (
        "experts",
        dict(model=lambda: experts(set_to=0.2)),
        "a model with router_aux_loss_coef 0.1, g",
    ),
    (
        "experts",
        dict(model=lambda: experts(output_router_logits=False)),
        "a model with output_router_logits True, got False",
    ),
    ("sepo", dict(model=lambda: tiny_model(pad_token_id=2)), "a model with padding_idx 1, got 2"),
    (
        "live",
        dict(reference=lambda: tiny_model(seed=1, rms_norm_eps=1e-3)),
        "a reference with rms_norm_eps 1e-06, got 0.001",
    ),
]


@pytest.mark.filterwarnings("ignore:.*measured:UserWarning")  # of bfloat16, on a slow machine
@pytest.mark.parametrize(
    ("kind", "change", "expected"), REFUSED, ids=[f"{k}-{'-'.join(c)}-{i}" for i, (k, c, _) in enumerate(REFUSED)]
)  # fmt: skip
def test_another_run_is_refused_by_name(begun, kind, change, expected):
    files = lambda: {p: p.read_bytes() for p in (begun / kind).rglob("*") if p.is_file()}
    before = files()
    with pytest.raises(InputError, match=f"checkpoint-1 is of another run: expected {expected}"):
        make(begun / kind, **changed(kind, change)).train(resume_from_checkpoint=True)
    assert files() == before


ALLOWED = [  # kind, the change, what is said
    ("sepo", dict(learning_rate=0.02), ["--learning_rate 0.02 (was 0.01)"]),
    ("sepo", dict(weight_decay=0.1), ["--weight_decay 0.1 (was 0.0)"]),
    ("sepo", dict(adam_beta1=0.8), ["--adam_beta1 0.8 (was 0.9)"]),
    ("sepo", dict(num_train_epochs=2), ["--num_train_epochs 2 (was 1.0)"]),
    ("sepo", dict(max_steps=3), ["--max_steps 3 (was -1)"]),
    ("cached", dict(warmup_steps=1), ["--warmup_steps 1 (was 0)"]),
    ("cached", dict(max_grad_norm=0.5), ["--max_grad_norm 0.5 (was 1.0)"]),
    ("cached", dict(max_tokens_per_batch=64), ["--max_tokens_per_batch 64 (was 8192)"]),
    ("live", dict(selective_checkpointing=True), ["--selective_checkpointing True (was False)"]),
    ("live", dict(attn_impl="sdpa"), ["--attn_impl sdpa (was auto)"]),
    ("lora", dict(head_budget=4096), ["--head_budget 4096 (was None)"]),
    (
        "sepo",
        dict(save_total_limit=2, logging_steps=2),
        ["--save_total_limit 2 (was None)", "--logging_steps 2 (was 1)"],
    ),
]


@pytest.mark.parametrize(("kind", "change", "said"), ALLOWED, ids=[f"{k}-{'-'.join(c)}" for k, c, _ in ALLOWED])  # fmt: skip
def test_what_may_change_is_said(tmp_path, begun, kind, change, said, caplog):
    trainer = make(tmp_path, **changed(kind, change))
    trainer.train(str(begun / kind / "checkpoint-1"))
    (line,) = [r.getMessage() for r in caplog.records if "goes on with" in r.getMessage()]
    assert sorted(line.partition(" goes on with ")[2].split(", ")) == sorted(said)
    assert trainer.state.global_step > 1


def test_what_does_not_matter_is_not_said(tmp_path, begun, caplog):
    unread = dict(gamma=9.0, fraction=0.9, margin=9.0)  # by DPO
    make(tmp_path, method="dpo", **unread, run_name="x").train(str(begun / "cached/checkpoint-1"))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("sepo")]
    assert said and all("does nothing" in line for line in said)


def test_the_optimiser_goes_on_with_what_is_said(tmp_path, begun):
    """The checkpoint's state holds the old ones, and would undo them."""
    change = dict(learning_rate=0.02, weight_decay=0.1, adam_beta2=0.9, adam_epsilon=1e-4)
    trainer = make(tmp_path, method="sepo", lr_scheduler_type="constant", **change)
    trainer.train(str(begun / "sepo" / "checkpoint-1"))
    assert trainer.state.log_history[1]["learning_rate"] == 0.02
    groups = trainer.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all((g["betas"], g["eps"]) == ((0.9, 0.9), 1e-4) for g in groups)


def test_a_learning_rate_that_changes_keeps_its_schedule(tmp_path):
    """At step n of N, whatever it was before."""
    run = dict(method="simpo", lr_scheduler_type="linear", num_train_epochs=2)
    make(tmp_path / "whole", **run).train()
    goes_on = make(tmp_path / "other", **run, learning_rate=0.08)
    goes_on.train(str(tmp_path / "whole" / "checkpoint-2"))
    rates = [line["learning_rate"] for line in goes_on.state.log_history if "loss" in line]
    assert rates == pytest.approx([0.01, 0.0075, 0.04, 0.02])


def test_a_schedule_that_keeps_its_rate_is_not_given_another(tmp_path):
    run = dict(
        method="simpo", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps",
        eval_steps=1, eval_pairs=PAIRS[:2], metric_for_best_model="loss",
    )  # fmt: skip
    make(tmp_path, **run).train()
    with pytest.raises(InputError, match="--learning_rate 0.01, which this --lr_scheduler_type"):
        make(tmp_path, **run, learning_rate=0.02).train(str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("kind", ["sepo", "cached", "live", "lora"])
def test_an_older_checkpoint_goes_on_and_says_what_was_not_compared(tmp_path, begun, kind, caplog):
    """Format 3 had the lengths of the pairs, not their contents."""
    shutil.copytree(begun / kind, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-1" / MARK
    mark = json.loads(path.read_text())
    known = {"method", "pairs", "pairs_per_step", "fraction", "rejected_fraction", "mass"}
    known |= {"first_token", "seed", "lengths", "trained", "loss"}
    mark["run"] = {key: mark["run"][key] for key in known}
    del mark["flags"]
    mark.pop("check", None)
    path.write_text(json.dumps(mark | {"format": 3}))
    trainer = make(tmp_path / "out", **KINDS[kind])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    (line,) = [r.getMessage() for r in caplog.records if "not compared" in r.getMessage()]
    said = {
        "sepo": ["scores (hash of those in the data)"],
        "cached": ["reference (hash of its log-probabilities in the data)"],
        "live": ["reference (hash of its weights)"],
        "lora": ["base model (hash of the weights that are not trained)"],
    }
    assert all(words in line for words in ["data (hash of its pairs)", "precision", *said[kind]])
    with pytest.raises(InputError, match="lengths of its pairs"):
        longer = first_pair(prompt=PAIRS[0].prompt.repeat(2))
        make(tmp_path / "out", **KINDS[kind], pairs=longer).train(str(path.parent))


def test_a_checkpoint_of_before_an_entry_goes_on_and_says_so(tmp_path, begun, caplog):
    shutil.copytree(begun / "live", tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-1" / MARK
    mark = json.loads(path.read_text())
    del mark["run"]["reference_model"], mark["check"]
    path.write_text(json.dumps(mark))
    make(tmp_path / "out", **KINDS["live"]).train(resume_from_checkpoint=True)
    (line,) = [r.getMessage() for r in caplog.records if "not compared" in r.getMessage()]
    older = "was not compared (an older version did not write them down)"
    assert line.endswith(f"checkpoint-1 {older}: the reference's configuration")


OLD_NAMES = [  # a run, how its mark says that under old names, and another run with what is refused
    (
        dict(method="dpop", dpop_lambda=3.0),
        dict(loss={"beta": 0.3, "penalty": 3.0}),
        (dict(dpop_lambda=4.0), "--dpop_lambda 3.0, got 4.0"),
    ),
    (
        dict(method="mapo", form="released", reference=1),
        dict(loss={"beta": 0.1, "form": "code", "mask_norm": "minmax"}),
        (dict(form="paper"), "--form released, got paper"),
    ),
    (
        dict(method="sepo", select="mass", rejected_fraction=0.5, first_token="released"),
        dict(fraction="mass", rejected_fraction=0.5, mass=0.8, first_token="official"),
        (dict(first_token="paper"), "--first_token released, got paper"),
    ),
]


@pytest.mark.parametrize(("run", "old", "other"), OLD_NAMES)
def test_a_checkpoint_under_old_names_goes_on(tmp_path, run, old, other, caplog):
    make(tmp_path, **run, max_steps=1).train()
    path = tmp_path / "checkpoint-1" / MARK
    mark = json.loads(path.read_text())
    assert mark["run"].keys() >= old.keys()
    mark["run"] |= old
    del mark["check"], mark["flags"]["selective_checkpointing"], mark["flags"]["reference"]
    mark["flags"] |= {"recompute": "cheap", "reference_model_name_or_path": None}
    path.write_text(json.dumps(mark))
    with pytest.raises(InputError, match=f"is of another run: expected {other[1]}"):
        make(tmp_path, **run | other[0]).train(str(path.parent))
    caplog.clear()
    goes_on = make(tmp_path, **run)
    goes_on.train(resume_from_checkpoint=True)
    assert goes_on.state.global_step == 2
    (line,) = [message for message in caplog.messages if "goes on with" in message]
    said = {"--selective_checkpointing False (was True)", "--max_steps -1 (was 1)"}
    assert {*line.partition("goes on with ")[2].split(", ")} == said


def test_cached_rows_of_the_same_weights(tmp_path):
    """Scored in another precision: neither the data nor the weights say so."""
    pairs = [TokenPair(id=p.id, **{n: getattr(p, n) for n in TOKENS}) for p in PAIRS]
    reference, tokenizer = prepare_model(tiny_model(seed=1)), tiny_tokenizer()
    about = dict(tokenizer=tokenizer, keep=["hidden"], progress=False)
    store = lambda name: ScoredStore.open(
        score_dataset(pairs, tmp_path / name, reference=reference, **about)
    )
    data = store("one")
    assert data.hidden_hash() == store("same").hidden_hash()
    with torch.autocast("cpu", torch.bfloat16):
        other = store("other")
    assert other.manifest["reference"] == data.manifest["reference"]
    run = dict(method="tdpo2", output_dir=str(tmp_path / "out"), pairs_per_step=4, use_cpu=True)
    train = lambda data, **more: SePOTrainer(
        tiny_model(), SePOConfig(**run, save_steps=1, disable_tqdm=True, **more), data
    )
    train(data, max_steps=1).train()
    expected = r"expected reference \(hash of its hidden rows in the data\) [0-9a-f]{16}, got"
    with pytest.raises(InputError, match=expected):
        train(other).train(resume_from_checkpoint=True)
    train(data).train(resume_from_checkpoint=True)


def test_what_an_optimizer_was_told_takes_effect(tmp_path):
    """As it is said: its state holds the old one."""
    run = dict(method="simpo", optim="sgd")
    make(tmp_path / "out", **run, optim_args="momentum=0.9", max_steps=1).train()
    goes_on = make(tmp_path / "out", **run, optim_args="momentum=0.5")
    goes_on.train(resume_from_checkpoint=True)
    assert {group["momentum"] for group in goes_on.optimizer.param_groups} == {0.5}


READ_OF_A_MODEL = {  # what the loss or its gradient takes beside the weights, each with another value
    "logits_scaling": 8.0, "logit_scale": 0.5, "final_logit_softcapping": 30.0,  # by the head
    "tie_word_embeddings": True, "sliding_window": 3, "attn_logit_softcapping": 50.0,
    "attention_dropout": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "rms_norm_eps": 0.1, "hidden_act": "gelu", "num_experts_per_tok": 1, "router_jitter_noise": 0.1,
    "output_router_logits": False,
}  # fmt: skip


@pytest.mark.parametrize("name", READ_OF_A_MODEL)
def test_every_number_that_is_read_of_a_configuration(name):
    """A resume with another would train another function: each is compared."""
    model = experts()
    before = sepo.trainer.identity._config(model)
    setattr(model.config, name, READ_OF_A_MODEL[name])
    after = sepo.trainer.identity._config(model)
    assert {key for key in after if before.get(key) != after[key]} >= {name}


def test_every_flag_that_is_read_is_compared_or_said():
    """Of those that the sources of a step name, each is in the run's identity or among its flags."""
    from sepo.trainer.identity import NO_CHANGE, describe_flags, describe_run
    from sepo.trainer.pairs import PreparedPairs

    sources = (
        "losses trainer/methods trainer/step trainer/mask trainer/pairs trainer/trainer model/reads "
        "model/frozen model/reference model/routers flags/selection"
    )
    root = Path(sepo.__file__).parent
    files = [root / f"{name}.py" for name in sources.split()] + [*(root / "masks").glob("*.py")]
    read = {
        name
        for file in files
        for name in re.findall(r"\b(?:a|args)\.([a-z_0-9]+)\b(?!\()", file.read_text())
    }
    args = SePOConfig(output_dir="unused", use_cpu=True)
    read &= {field.name for field in fields(args)}
    told = set(describe_flags(args))
    for name in METHODS:
        args = SePOConfig(output_dir="unused", method=name, use_cpu=True)
        run = describe_run(tiny_model(), args, PreparedPairs(PAIRS, args))
        told |= run.keys() | run["loss"].keys() | run["precision"].keys()
    # data_seed and seed are "seed"; the others say where and what is told, or are contents; which
    # way tokens are selected is what "fraction" is
    elsewhere = {"output_dir", "push_to_hub", "logging_nan_inf_filter", "dtype", "report_to"}
    elsewhere |= {"select", "rejected_select"}
    assert read - told <= elsewhere & NO_CHANGE
    assert {
        "beta",
        "gamma",
        "mask_norm",
        "head_budget",
        "pairs_per_step",
        "disable_dropout",
    } <= read


def test_every_setting_of_a_method_is_in_one_place():
    """A flag is of the identity or may change: never both, and none is forgotten."""
    from sepo.trainer.identity import describe_flags, describe_run
    from sepo.trainer.pairs import PreparedPairs

    for name in METHODS:
        args = SePOConfig(output_dir="unused", method=name, use_cpu=True)
        run = describe_run(tiny_model(), args, PreparedPairs(PAIRS, args))
        assert not describe_flags(args).keys() & (run["loss"].keys() | run["precision"].keys())
        assert json.loads(json.dumps(run)) == run
