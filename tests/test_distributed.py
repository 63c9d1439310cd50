"""Two gloo processes and one give the same training."""

import pytest
import torch
from processes import ROOT, run
from safetensors.torch import load_file
from tiny import random_scored_pairs, tiny_model
from training_run import make_run

from sepo import SePOConfig, SePOTrainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pairs_per_step", [5, 1], ids=["5-pairs", "a-rank-without-pairs"])
def test_ddp_equals_one_process(tmp_path, pairs_per_step):
    arguments = make_run(
        tmp_path,
        pairs=5,
        pairs_per_step=pairs_per_step,
        num_train_epochs=2,
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
    )
    for ranks in (1, 2):
        run("-m", "sepo.train", *arguments, "--output_dir", tmp_path / f"r{ranks}", ranks=ranks)
    one, two = (load_file(tmp_path / f"r{r}" / "model.safetensors") for r in (1, 2))
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        moved = (expected - start[name]).abs().max()
        assert moved > 0, name
        torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-4 * moved.item())
    one, two = ((tmp_path / f"r{r}" / "metrics.jsonl").read_text().splitlines() for r in (1, 2))
    assert len(one) == len(two)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp2")
    run(ROOT / "tests/workers/fsdp2_step.py", out, ranks=2)
    return torch.load(out / "steps.pt", weights_only=True)


@pytest.mark.parametrize("head", ["tied", "untied", "own_head"])
def test_fsdp2_step_equals_one_process(tmp_path, sharded, head):
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
