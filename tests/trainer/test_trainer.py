"""One step is a fixed set of pairs: the gradient knows nothing of budgets or micro-batches."""

import json

import pytest
import torch
from method_losses import dense_loss, scored_pairs
from tiny import V, random_scored_pairs, tiny_model, tiny_tokenizer
from tiny_trainer import LONGEST, PAIRS, bare, make_trainer, weights

from sepo import SePOConfig, SePOTrainer
from sepo.data import Segment, TokenPair, attention_cost, pair_costs
from sepo.errors import InputError
from sepo.trainer import metrics
from sepo.trainer.checkpoints import last_checkpoint
from sepo.trainer.methods import METHODS
from sepo.trainer.pairs import PreparedPairs


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("budget", [LONGEST, 64])
def test_the_budget_changes_nothing(tmp_path, method, budget):
    run = lambda tokens: make_trainer(
        tmp_path, dtype=torch.float64, method=method, max_tokens_per_batch=tokens
    )
    whole, split = run(None), run(budget)
    whole.train(), split.train()
    assert whole.state.global_step == split.state.global_step == 3
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["dpo", "sepo", "sepo-rand", "sft", "simpo"])
def test_a_step_descends_the_dense_loss(tmp_path, method):
    """Plain gradient descent by hand on the definition, against the trainer's first step."""
    pairs = scored_pairs(3)
    args = dict(gamma=2.0, margin=0.5, beta=0.7, label_smoothing=0.1, seed=5)
    trainer = make_trainer(
        tmp_path,
        dtype=torch.float64,
        pairs=pairs,
        method=method,
        pairs_per_step=len(pairs),
        fraction=0.5,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_tokens_per_batch=LONGEST,
        **args,
    )
    trainer.train()
    model = tiny_model(dtype=torch.float64)
    loss = dense_loss(model, pairs, method, 0.5)
    loss = loss / (sum(len(p.chosen) for p in pairs) if method == "sft" else len(pairs))
    loss.backward()
    for name, p in model.named_parameters():
        expected = p.detach() - 0.05 * p.grad
        torch.testing.assert_close(weights(trainer)[name], expected, rtol=0, atol=1e-10)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_live_reference_equals_the_cached_one(tmp_path):
    from sepo.model.prepare import prepare_model
    from sepo.score.score import score_pairs

    reference = prepare_model(tiny_model(seed=1))
    cached = make_trainer(
        tmp_path, pairs=score_pairs(bare(PAIRS), reference, keep=["logp"]), method="dpo"
    )
    live = make_trainer(tmp_path, pairs=bare(PAIRS), method="dpo", reference_model=reference)
    cached.train(), live.train()
    for name, expected in weights(cached).items():
        torch.testing.assert_close(weights(live)[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["a Dataset", "a list of dicts", "a stream"])
def test_rows_are_tokenised(tmp_path, kind):
    rows = [dict(prompt="w3 w4", chosen=" w5", rejected=" w6 w7")] * 3
    rows += [dict(prompt="w3", chosen=" w5", rejected=" w5")]
    if kind != "a list of dicts":
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    if kind == "a stream":
        rows = rows.to_iterable_dataset()
    args = SePOConfig(output_dir=str(tmp_path), method="simpo", use_cpu=True, disable_tqdm=True)
    trainer = SePOTrainer(tiny_model(), args, rows, processing_class=tiny_tokenizer())
    assert len(trainer.train_pairs) == 3  # identical responses are dropped
    assert trainer.train_pairs.selected.tolist() == [2 + 3] * 3  # each ends with eos
    trainer.train()


def test_strict_drops_rows_with_notes(tmp_path):
    rows = [dict(prompt="w3 w4", chosen=f"{' w5' * n}", rejected=" w6 w7") for n in (1, 9)]
    how = dict(output_dir=str(tmp_path), method="simpo", use_cpu=True, max_length=6)
    for strict, lengths in ((False, [2 + 3, 4 + 3]), (True, [2 + 3])):
        args = SePOConfig(**how, strict=strict)
        trainer = SePOTrainer(tiny_model(), args, rows, processing_class=tiny_tokenizer())
        assert trainer.train_pairs.selected.tolist() == lengths


def test_metrics_are_means_over_pairs(tmp_path):
    trainer = make_trainer(tmp_path, method="dpo", logging_steps=1, eval_strategy="epoch")
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"rewards/chosen", "rewards/margins", "logps/rejected", "tokens/read"} <= set(steps[0])
    # all 13 pairs before any update, 5 + 5 + 3 of them a step: the learning rate starts at 0
    first = make_trainer(tmp_path / "first", method="dpo").evaluate(PAIRS)
    at_once = make_trainer(tmp_path / "once", method="dpo", pairs_per_step=13)
    at_once.train()
    logged = at_once.state.log_history[0]
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert logged[name] == pytest.approx(first[f"eval_{name}"], rel=1e-5)
    assert logged["loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    evaluation = [line for line in lines if "eval_loss" in line]
    assert len(evaluation) == 1 and evaluation[0]["step"] == 3


def test_token_counts_are_those_of_the_step(tmp_path):
    trainer = make_trainer(tmp_path, pairs_per_step=13, fraction=0.5)
    trainer.train()
    counts = trainer.state.log_history[0]
    K = lambda y: max(1, int(0.5 * len(y) + 1e-9))
    assert counts["tokens/selected"] == sum(K(p.chosen) + K(p.rejected) for p in PAIRS)
    assert counts["tokens/read"] < sum(len(p) for p in PAIRS)


def test_throughput_counts_steps_and_not_what_lies_between_lines(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    trainer = make_trainer(
        tmp_path, logging_steps=2, max_steps=4, eval_strategy="steps", eval_steps=2
    )
    original = trainer._losses

    def slow(*given):
        clock[0] += 3.0 if trainer.model.training else 1000.0
        return original(*given)

    monkeypatch.setattr(trainer, "_losses", slow)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "tokens/second" in line]
    assert [line["step"] for line in lines] == [2, 4]
    read = [
        int(trainer.train_pairs.lengths[trainer._plan(trainer.train_pairs, 5, step=s).pairs].sum())
        for s in range(4)
    ]
    found = [line["tokens/second"] for line in lines]
    assert found == pytest.approx([(read[0] + read[1]) / 6, (read[2] + read[3]) / 6])


def test_dropout_is_off_by_default(tmp_path):
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    trainer = make_trainer(tmp_path, model=model)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    trainer.train()


def test_a_checkpoint_is_a_hugging_face_model(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(last_checkpoint(tmp_path))
    assert loaded.config._attn_implementation == "sdpa"
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights(trainer)[name])


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    with pytest.raises(InputError, match="checkpoint-3 is not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_sepo_without_scores_names_the_row(tmp_path):
    pair = TokenPair(
        id="x7", prompt=PAIRS[0].prompt, chosen=PAIRS[0].chosen, rejected=PAIRS[0].chosen
    )
    with pytest.raises(InputError, match="pair x7: expected a score per chosen token"):
        make_trainer(tmp_path, pairs=[pair])


def test_dpo_without_a_reference_says_so(tmp_path):
    pair = TokenPair(
        id="0", prompt=PAIRS[0].prompt, chosen=PAIRS[0].chosen, rejected=PAIRS[1].chosen
    )
    with pytest.raises(InputError, match="--method dpo needs a reference"):
        make_trainer(tmp_path, pairs=[pair], method="dpo")


def test_tokens_outside_the_vocabulary(tmp_path):
    from dataclasses import replace

    pair = replace(PAIRS[0], prompt=PAIRS[0].prompt + V)
    with pytest.raises(
        InputError, match=f"pair 0: token .*, but the policy has a vocabulary of {V}"
    ):
        make_trainer(tmp_path, pairs=[pair])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("fraction", 0.0, r"--fraction: expected a number in \(0, 1\], got 0"),
        ("fraction", 1.5, r"--fraction: expected a number in \(0, 1\], got 1.5"),
        ("pairs_per_step", 0, "--pairs_per_step: expected a positive number"),
        ("max_tokens_per_batch", 0, "--max_tokens_per_batch: expected a positive number"),
        ("label_smoothing", 0.5, "--label_smoothing"),
        ("method", "sepoo", r"--method: expected sft \| dpo .*, got sepoo"),
        (
            "attn_impl",
            "fa9",
            r"--attn_impl: expected auto \| varlen \| flex \| native \| sdpa, got fa9",
        ),
        ("dtype", "float8", r"--dtype: expected float32 \| bfloat16, got float8"),
        ("lora_r", 0, "--lora_r: expected a positive number, got 0"),
        ("load_in_4bit", True, "--load_in_4bit: expected --use_peft too"),
        ("use_liger_kernel", True, "--use_liger_kernel: its kernels need a GPU, got a CPU"),
        ("gradient_accumulation_steps", 4, "--gradient_accumulation_steps has no meaning here"),
        ("per_device_train_batch_size", 4, "--per_device_train_batch_size has no meaning here"),
    ],
)
def test_arguments_that_cannot_be_trained_with(tmp_path, argument, value, message):
    with pytest.raises(InputError, match=message):
        SePOConfig(output_dir=str(tmp_path), use_cpu=True, **{argument: value})


@pytest.mark.parametrize("data", ["pairs", "eval_pairs"])
def test_a_pair_longer_than_the_budget(tmp_path, data):
    """The row, its length, and the least budget that works; nothing is written."""
    row, most = max(PAIRS, key=len), LONGEST - 1  # "all" reads a pair but for its last two tokens
    short = [p for p in PAIRS if len(p) < most]
    sets = {"pairs": short, "eval_pairs": short} | {data: PAIRS}
    run = lambda budget: make_trainer(
        tmp_path / "out", method="simpo", max_tokens_per_batch=budget, **sets
    )
    message = rf"pair {row.id}: expected at most {most - 2} tokens .*got {most - 1}"
    with pytest.raises(InputError, match=message):
        run(most - 2)
    assert not (tmp_path / "out").exists()
    run(most - 1).train()
    assert LONGEST == most + 1


def test_prepared_pairs_hold_no_tokens():
    """A million pairs are counted once and read when their step comes."""
    import gc

    data = random_scored_pairs(50)
    prepared = PreparedPairs(data, SePOConfig(output_dir="-", method="sepo", use_cpu=True))
    held = [x for x in gc.get_referents(*vars(prepared).values()) if isinstance(x, Segment)]
    assert held == []
    for i, (prompt, chosen, rejected) in enumerate(prepared):
        read = [len(prompt), len(chosen.response), len(rejected.response)]
        assert prepared.parts[i].tolist() == read and prepared.lengths[i] == sum(read)
        assert prepared.selected[i] == len(chosen.targets) + len(rejected.targets)


def test_the_plan_knows_what_attention_costs(tmp_path):
    trainer = make_trainer(tmp_path, method="simpo")
    pairs, trunk = trainer.train_pairs, trainer.model.model
    parameters = sum(p.numel() for name, p in trunk.named_parameters() if "embed" not in name)
    share = attention_cost(trainer.model.config, trunk_parameters=parameters)
    assert pairs.costs.tolist() == pair_costs(*pairs.parts.T, attention=share).tolist()
    assert (pairs.costs > pairs.lengths).all()
