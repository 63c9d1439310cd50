"""Would the tests notice? Each mutant breaks a copy of the code on purpose; its tests must fail.

The text to be broken must occur exactly once, so a mutant that the code has outgrown is noticed too.
"""

import json
import shutil
from pathlib import Path

import pytest
from processes import ROOT, run

pytestmark = pytest.mark.slow

ALONE = {"PYTHONPATH": ""}  # the copies' folders, and none of this tree's
LOGPROB = "sepo_kernels/selected_logprob/chunked.py"
OPERATION = "tests/ops/test_selected_logprob.py"
PIPELINE = "tests/trainer/test_pipeline.py"
STEPS = f"{PIPELINE}::test_a_step_equals_the_formula"
MUTANTS = {
    "assign instead of add for repeated rows": (
        "sepo_kernels/gemm.py",
        "total.index_add_(0, rows, values)",
        "total.index_copy_(0, rows.long(), values)",
        f"{OPERATION}::test_gradients_of_repeated_rows_add_up",
    ),
    "columns beyond V in the sum": (
        LOGPROB,
        "total = z.sub_(top).exp_().sum(-1, keepdim=True)",
        "pad = -z.shape[1] % 32\n"
        "    total = z.sub_(top).exp_().sum(-1, keepdim=True) + pad * (-top).exp()",
        f"{OPERATION}::test_equals_the_definition_in_float64",
    ),
    "the rejected's first row off by one": (
        "python/sepo/data/pack.py",
        "np.where(segment.positions == 0, first - 1, row)",
        "row",
        "tests/data/test_pack.py::test_first_rejected_token_is_predicted_by_the_prompt",
    ),
    "one token too many cut": (
        "python/sepo/data/truncate.py",
        "last = int(positions[-1]) if len(positions) else 0",
        "last = max(0, int(positions[-1]) - 1) if len(positions) else 0",
        f"{PIPELINE}::test_packed_equals_dense",
    ),
    "needs_input_grad ignored": (
        "python/sepo/ops/_selected_logprob.py",
        "need = ctx.needs_input_grad[:3]",
        "need = (True, True, False)",
        f"{OPERATION}::test_only_what_needs_a_gradient_gets_one",
    ),
    "a base held twice": (
        "python/sepo/model/folder.py",
        "beside = copy.deepcopy(model, tensors)",
        "beside = copy.deepcopy(model)",
        "tests/model/test_sharing.py::test_an_adapter_lies_beside_its_base",
    ),
    "scoring that begins again with each part": (
        "python/sepo/score/score.py",
        "with closing(answers_of(blocks, asked, max_tokens, on_batch)) as told:",
        "for block in blocks:\n        told = answers_of([block], asked, max_tokens, on_batch)",
        "tests/model/test_feed.py::test_scoring_makes_the_next_parts_first_batch_ahead",
    ),
    "a silent fallback": (
        "sepo_kernels/registry.py",
        "raise ValueError(f'impl=\"{requested}\" cannot run here: {reason}')",
        'return pick(impls, "auto", *call)',
        "tests/ops/test_selected_logprob_boundary.py",
    ),
    "the weights of a mixture exchanged": (
        "sepo_kernels/selected_logprob_kl/chunked.py",
        "of_p, of_q = ratio.new_full((), 1 - beta), ratio.new_full((), beta)",
        "of_q, of_p = ratio.new_full((), 1 - beta), ratio.new_full((), beta)",
        "tests/ops/test_selected_logprob_jsd.py::test_equals_the_definition_in_float64",
    ),
    "an output part unwritten": (
        LOGPROB,
        "dlogits.copy_(p)",
        "dlogits[:, :-1].copy_(p[:, :-1])",
        OPERATION,
    ),
    "a rejected token hidden from itself": (
        "python/sepo/attention/sdpa.py",
        "tril(self.shift)",
        "tril(self.shift - 1)",
        f"{PIPELINE}::test_packed_equals_dense",
    ),
    "the second copy of a prompt without a gradient": (
        "python/sepo/attention/varlen.py",
        'total.index_add_(0, places["shared"], grad.index_select(0, places["second"]))',
        "pass",
        "tests/attention/test_attention.py::test_values_and_gradients_are_the_definition",
    ),
    "what inference renders is not looked at": (
        "python/sepo/data/read/render.py",
        "notes = (RowNote.UNSEEN, *notes)",
        "pass",
        "tests/data/test_templates.py",
    ),
    "what a template cuts from a response is not looked for": (
        "python/sepo/data/read/content.py",
        "if not is_earlier and not all(map(found, _reasoning(message))):",
        "if False:",
        "tests/data/test_templates.py",
    ),
    "a folder's files as one table": (
        "python/sepo/data/read/load.py",
        "if isinstance(builder, Json) and options.field is None:",
        "if False:",
        "tests/data/test_rows.py",
    ),
    "ranks dealt by count": (
        "python/sepo/data/plan.py",
        "heapreplace(loads, (load + dearest, rank))",
        "heapreplace(loads, (load + 1, rank))",
        "tests/data/test_plan.py",
    ),
    "TDPO2's stop-gradient on the other response": (
        "python/sepo/losses.py",
        "torch.stack([chosen.detach(), rejected], 1)",
        "torch.stack([chosen, rejected.detach()], 1)",
        "tests/test_losses.py",
    ),
    "DPOP's penalty outside beta": (
        "python/sepo/losses.py",
        "-F.logsigmoid(beta * _chosen_minus_rejected(dpop_logratio(logratio, penalty)))",
        "-F.logsigmoid(beta * _chosen_minus_rejected(logratio) "
        "- penalty * F.relu(-logratio[0::2]))",
        "tests/test_losses.py",
    ),
    "a mask read one row late": (
        "python/sepo/masks/readers.py",
        "gather = lambda output: output.index_select(0, batch.rows)",
        "gather = lambda output: output.index_select(0, (batch.rows + 1) % len(output))",
        STEPS,
    ),
    "the divergence of the paper's form the other way round": (
        "python/sepo/trainer/methods.py",
        '_FORWARD if a.form == "released" else _REVERSE',
        "_FORWARD",
        "tests/trainer/test_golden_steps.py",
    ),
    "the reward's mask on the divergence": (
        "python/sepo/trainer/methods.py",
        "kl=total(tokens.kl, tokens.kl_mask)",
        "kl=total(tokens.kl, tokens.reward_mask)",
        "tests/trainer/test_golden_steps.py",
    ),
    "another value in a part of a store": (
        "python/sepo/data/store/part.py",
        "self.check != _check_of(self.ids, self.columns, self.about)",
        "False",
        "tests/data/test_whole.py",
    ),
    "a flipped bit in hidden rows": (
        "python/sepo/data/hidden.py",
        "crc32_of_tensor(rows) != self.check",
        "False",
        "tests/data/test_whole.py",
    ),
    "a part in the place of another": (
        "python/sepo/system/checksums.py",
        "if key in found and found[key] != expected.get(key):",
        "if False:",
        "tests/data/test_whole.py",
    ),
    "a flipped bit in a checkpoint": (
        "python/sepo/trainer/checkpoints.py",
        "if digest != files[name][1]:",
        "if False:",
        "tests/trainer/test_checkpoints.py",
    ),
    "a run known by its lengths": (
        "python/sepo/trainer/pairs.py",
        "one.add(pair)",
        "pass",
        "tests/trainer/test_identity.py::test_another_run_is_refused_by_name",
    ),
    "a step that is not finite and goes on": (
        "python/sepo/trainer/trainer.py",
        "self._refuse_step(*(value.item() for value in values))",
        "pass",
        "tests/trainer/test_not_finite.py::test_step_and_rows_are_named",
    ),
    "the newest checkpoint deleted": (
        "python/sepo/trainer/checkpoints.py",
        "kept = {newest} |",
        "kept = set() |",
        "tests/trainer/test_kept_checkpoints.py",
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, request) -> dict[str, dict]:
    """What came of each mutant's tests: pytest's exit code, and what was printed."""
    place = tmp_path_factory.mktemp("mutants")
    # on the lowest versions warnings are not errors
    warnings = [f"-W{how}" for how in request.config.getoption("pythonwarnings") or ()]
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *warnings]
    jobs = [
        {"folder": str(broken_copy(name, place)), "arguments": [*options, MUTANTS[name][3]]}
        for name in MUTANTS
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    run(ROOT / "tests/workers/mutants.py", place / "jobs.json", timeout=1200, environment=ALONE)
    return dict(zip(MUTANTS, json.loads((place / "jobs.json").read_text()), strict=True))


def broken_copy(name: str, place: Path) -> Path:
    """The code and its tests with one mutant in them."""
    file, old, new, _ = MUTANTS[name]
    copy = place / str(list(MUTANTS).index(name))
    for folder in ("sepo_kernels", "python", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    source = (copy / file).read_text()
    assert source.count(old) == 1, f"{file} no longer holds once: {old}"
    (copy / file).write_text(source.replace(old, new))
    return copy


@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_catches(name, found):
    tests = MUTANTS[name][3]
    if tests == "tests/data/test_rows.py":
        pytest.importorskip("datasets")  # as these tests do
    code, said = found[name]["code"], found[name]["said"]
    assert code == 1, f"no test of {tests} noticed:\n{said[-2000:]}"
    assert "1 failed" in said  # not an error on the way to the tests
