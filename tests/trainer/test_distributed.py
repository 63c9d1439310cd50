"""Two gloo processes and one give the same training, whatever is sharded between them."""

import json

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_runs import MODELS, RUN, assert_same_weights
from processes import ROOT, free_port, run, run_jobs, start
from safetensors.torch import load_file
from tiny import random_scored_pairs, tiny_model
from training_run import make_run, read_log
from transformers import AutoModelForCausalLM

from sepo import SePOConfig, SePOTrainer
from sepo.errors import InputError

pytestmark = pytest.mark.slow


def launch_environment(name: str) -> dict:
    """What `accelerate launch` tells the ranks of examples/accelerate's NAME.yaml."""
    file = str(ROOT / f"examples/accelerate/{name}.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", file, "-m", "sepo.train"])
    environment = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    ours = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in environment.items() if name.startswith(ours)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each head: one process, and whatever must equal it."""
    path = tmp_path_factory.mktemp("runs")
    (path / "refused").mkdir()
    jobs = [job for head, model in MODELS.items() for job in jobs_of(path / head, model)]
    refused = [*jobs[0]["argv"][:-1], str(path / "refused" / "out")]
    fsdp2 = launch_environment("fsdp2")
    jobs.append(dict(argv=refused, ranks=2, environment=fsdp2, code=1))
    (path / "step").mkdir()
    jobs.append(dict(argv=["--output_dir", str(path / "step")], ranks=2, step=True))
    jobs += masked_jobs(path / "masked")
    for method in RULES:
        jobs += rule_jobs(path / method, method)
    run_jobs(path, jobs)
    return path


def jobs_of(path, model):
    arguments = make_run(path, model=model, **RUN)
    out = lambda name: ["--output_dir", str(path / name)]
    saving = ["--optim", "adamw_torch", "--save_strategy", "steps", "--save_steps", "2"]
    resume = ["--resume_from_checkpoint", str(path / "fsdp2-adam" / "checkpoint-2")]
    # the README's flags, instead of accelerate's file
    flags = ["--fsdp", "--fsdp_config", json.dumps({"state_dict_type": "FULL_STATE_DICT"})]
    on_a_cpu = {"SEPO_TESTS_SHARD_ON_A_CPU": "1"}
    flagged = dict(ranks=2, environment=on_a_cpu)
    filed = dict(ranks=2, environment=launch_environment("fsdp2") | on_a_cpu)
    big = ["--max_tokens_per_batch", "400"]
    unlogged = ["--save_steps", "2", "--logging_steps", "3"]
    grown = ["--resume_from_checkpoint", str(path / "one-saved" / "checkpoint-2")]
    return [
        dict(argv=[*arguments, *out("one")]),
        dict(argv=[*arguments, *out("one-big"), *big]),
        dict(argv=[*arguments, *out("ddp")], ranks=2),
        dict(
            argv=[*arguments, *out("ddp-big"), *big, "--ddp_find_unused_parameters", "0"], ranks=2
        ),
        dict(argv=[*arguments, *out("fsdp2")], **filed),
        dict(argv=[*arguments, *flags, *out("fsdp2-adam"), *saving], **flagged),
        dict(argv=[*arguments, *flags, *out("fsdp2-resumed"), *saving, *resume], **flagged),
        dict(argv=[*arguments, *out("one-saved"), "--save_strategy", "steps", *unlogged]),
        dict(argv=[*arguments, *out("more-ranks"), *unlogged, *grown], ranks=2),
    ]


def masked_jobs(path):
    """SparsePO's mask among the parameters that ranks share; the reference is another model."""
    # as drawn, a mask is about 0.001: only large rates move a weight by more than its rounding
    rates = dict(learning_rate=5.0, mask_learning_rate=0.5)
    arguments = make_run(path, **(RUN | rates | dict(method="sparsepo", beta=2.0)))
    tiny_model(seed=1).save_pretrained(path / "reference")
    arguments += ["--reference", str(path / "reference")]
    out = lambda name: ["--output_dir", str(path / name)]
    sharded = launch_environment("fsdp2") | {"SEPO_TESTS_SHARD_ON_A_CPU": "1"}
    return [
        dict(argv=[*arguments, *out("one")]),
        dict(argv=[*arguments, *out("ddp")], ranks=2),
        dict(argv=[*arguments, *out("fsdp2")], ranks=2, environment=sharded),
    ]


RULES = ("confpo", "selective-dpo", "sepo-entropy")


def rule_jobs(path, method):
    """Each rank chooses in its own micro-batches, and in the last step one has none."""
    arguments = make_run(path, **(RUN | dict(method=method, eval_pairs=0, eval_strategy="no")))
    if method == "selective-dpo":  # by a live reference, of rows without scores
        tiny_model(seed=1).save_pretrained(path / "reference")
        rows = [
            {
                f"{name}_ids": getattr(pair, name).tolist()
                for name in ("prompt", "chosen", "rejected")
            }
            for pair in random_scored_pairs(RUN["pairs"])
        ]
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += ["--dataset_name", str(path / "rows.jsonl")]
        arguments += ["--reference", str(path / "reference")]
    out = lambda name: ["--output_dir", str(path / name)]
    sharded = launch_environment("fsdp2") | {"SEPO_TESTS_SHARD_ON_A_CPU": "1"}
    return [
        dict(argv=[*arguments, *out("one")]),
        dict(argv=[*arguments, *out("big"), "--max_tokens_per_batch", "400"]),
        dict(argv=[*arguments, *out("ddp")], ranks=2),
        dict(argv=[*arguments, *out("fsdp2")], ranks=2, environment=sharded),
    ]


each_head = pytest.mark.parametrize("head", MODELS)


@pytest.mark.parametrize("other", ["ddp", "fsdp2"])
def test_a_learned_mask_equals_one_process(runs, other):
    runs = runs / "masked"
    assert_same_weights(runs / other, runs / "one", runs / "model")
    found, expected = (
        load_file(runs / name / "sparse_mask.safetensors") for name in (other, "one")
    )
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)
    for line, one in zip(read_log(runs / other), read_log(runs / "one"), strict=True):
        assert line == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("other", ["big", "ddp", "fsdp2"])
@pytest.mark.parametrize("method", RULES)
def test_a_rule_equals_one_process(runs, method, other):
    runs = runs / method
    assert_same_weights(runs / other, runs / "one", runs / "model")
    for line, one in zip(read_log(runs / other), read_log(runs / "one"), strict=True):
        # a margin is the small difference of two rewards, which are some tens and in float32
        assert line == pytest.approx(one, rel=1e-4, abs=1e-5)
        assert "loss" not in line or 0 < line["selection/density"] < 1


@each_head
@pytest.mark.parametrize(
    ("other", "one"),
    [
        ("one-big", "one"),
        ("ddp", "one"),
        ("ddp-big", "one"),
        ("fsdp2", "one"),
        ("more-ranks", "one-saved"),  # resumed with two ranks, between two lines of the log
    ],
)
def test_equals_one_process(runs, head, other, one):
    runs = runs / head
    assert_same_weights(runs / other, runs / one, runs / "model")
    for line, expected in zip(read_log(runs / other), read_log(runs / one), strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@each_head
def test_fsdp2_shards(runs, head):
    """Against a silent fall back to DDP, which would equal one process just as well."""
    checkpoint = runs / head / "fsdp2-adam" / "checkpoint-2"
    assert (checkpoint / "optimizer.bin").is_file() and not (checkpoint / "optimizer.pt").exists()


@each_head
def test_fsdp2_resumes_from_its_checkpoint(runs, head):
    whole, resumed = runs / head / "fsdp2-adam", runs / head / "fsdp2-resumed"
    assert (whole / "model.safetensors").read_bytes() == (
        resumed / "model.safetensors"
    ).read_bytes()
    assert read_log(whole) == read_log(resumed)


def test_flop_are_counted_once(runs):
    total = lambda name: json.loads((runs / "tied" / name / "trainer_state.json").read_text())[
        "total_flos"
    ]
    # a rank's share is rounded down
    assert total("ddp") == pytest.approx(total("one"), rel=0.02)


@each_head
def test_fsdp2_saves_a_whole_model(runs, head):
    runs = runs / head
    model = AutoModelForCausalLM.from_pretrained(runs / "fsdp2-adam" / "checkpoint-6")
    saved = load_file(runs / "fsdp2-adam" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def test_fsdp2_is_not_left_out_silently(runs):
    """Sharded it can't run on CPUs, and accelerate would train otherwise and say nothing."""
    log = (runs / "refused" / "forks.log").read_text()
    assert "--fsdp: expected GPUs to shard over, got 2 ranks on cpu" in log
    assert not (runs / "refused" / "out").exists()


def test_two_nodes(runs, tmp_path):
    """The README's torchrun line, both agents on this machine."""
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "1"]
    nodes += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "-m", "sepo.train"]
    training = ["--config", runs / "tied" / "run.yaml", "--output_dir", tmp_path]
    agents = [start("-m", "torch.distributed.run", *nodes, *training) for _ in range(2)]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_same_weights(tmp_path, runs / "tied" / "one", runs / "tied" / "model")


@pytest.mark.parametrize("name", ["single", "multi", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_example(name):
    environment = launch_environment(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # --bf16 decides
    assert ("FSDP_VERSION" in environment) == (name == "fsdp2")


def test_accelerate_launches_the_example(tmp_path, runs):
    file = ROOT / "examples/accelerate/multi.yaml"
    launch = ("-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2")
    training = ("-m", "sepo.train", "--config", runs / "tied" / "run.yaml")
    run(*launch, *training, "--output_dir", tmp_path)
    assert_same_weights(tmp_path, runs / "tied" / "one", runs / "tied" / "model")


def test_zero3_and_a_live_reference(tmp_path, monkeypatch):
    monkeypatch.setattr("sepo.model.reference.is_deepspeed_zero3_enabled", lambda: True)
    args = SePOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, method="dpo")
    with pytest.raises(InputError, match="ZeRO-3 .* got a live reference"):
        SePOTrainer(tiny_model(), args, random_scored_pairs(3), reference_model=tiny_model())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["tied", "untied", "own_head"])
def test_fsdp2_step_equals_one_process(tmp_path, runs, head):
    sharded = torch.load(runs / "step" / "steps.pt", weights_only=True)
    args = SePOConfig(output_dir=str(tmp_path / "one"), use_cpu=True, pairs_per_step=7)
    model = tiny_model("llama", tie_word_embeddings=head == "tied")
    trainer = SePOTrainer(model, args, random_scored_pairs(7))
    loss = trainer.training_step(model, {})
    torch.testing.assert_close(sharded[head]["loss"], loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            sharded[head]["gradients"][name], parameter.grad, rtol=0, atol=1e-5 * scale
        )
