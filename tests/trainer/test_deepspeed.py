"""ZeRO-2 and ZeRO-3 on two ranks equal one process. Skipped where DeepSpeed is not installed.

DeepSpeed runs on a CPU too: `DS_ACCELERATOR=cpu`, gloo between the ranks.
"""

import importlib.util
import json

import pytest
import yaml
from distributed_runs import MODELS, RUN, assert_same_weights
from processes import ROOT, run_jobs
from training_run import make_run, read_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}


def deepspeed_config(name: str) -> dict:
    """What accelerate makes of an example's YAML, with nothing too small to be sharded."""
    given = yaml.safe_load((ROOT / f"examples/accelerate/{name}.yaml").read_text())
    given = given["deepspeed_config"]
    zero = {"stage": given["zero_stage"]}
    if given["zero_stage"] == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": given["zero3_save_16bit_model"]}
        zero |= {"stage3_param_persistence_threshold": 0}
    return {
        "zero_optimization": zero,
        "gradient_clipping": given["gradient_clipping"],
        "gradient_accumulation_steps": given["gradient_accumulation_steps"],
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }


@pytest.fixture(scope="module", params=MODELS)
def runs(tmp_path_factory, request):
    path = tmp_path_factory.mktemp(request.param)
    arguments = make_run(path, model=MODELS[request.param], **RUN)
    out = lambda name: ["--output_dir", str(path / name)]
    saving = ["--optim", "adamw_torch", "--save_strategy", "steps", "--save_steps", "2"]
    jobs = [dict(argv=[*arguments, *out("one")])]
    for name in ("zero2", "zero3"):
        (path / f"{name}.json").write_text(json.dumps(deepspeed_config(name)))
        zero = [*arguments, "--deepspeed", str(path / f"{name}.json")]
        where = dict(ranks=2, environment=ENVIRONMENT)
        resume = ["--resume_from_checkpoint", str(path / f"{name}-adam" / "checkpoint-2")]
        jobs += [
            dict(argv=[*zero, *out(name)], **where),
            dict(argv=[*zero, *out(f"{name}-adam"), *saving], **where),
            dict(argv=[*zero, *out(f"{name}-resumed"), *saving, *resume], **where),
        ]
    run_jobs(path, jobs)
    return path


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_equals_one_process(runs, zero):
    assert_same_weights(runs / zero, runs / "one", runs / "model")
    for line, expected in zip(read_log(runs / zero), read_log(runs / "one"), strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_resumes_from_its_checkpoint(runs, zero):
    whole, resumed = runs / f"{zero}-adam", runs / f"{zero}-resumed"
    assert (whole / "model.safetensors").read_bytes() == (
        resumed / "model.safetensors"
    ).read_bytes()
    assert read_log(whole) == read_log(resumed)
