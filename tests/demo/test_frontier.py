"""The frontier experiment on a tiny model: real training, in seconds."""

import json

import numpy as np
import pytest
from characters import character_tokenizer
from tiny import tiny_model

from sepo.errors import InputError
from sepo.model.load import load_model
from sepo.score.score import score_pairs

SEPO, SPARSEPO = "sepo_gamma2_k0.3_oracle100_seed0", "sparsepo_beta0.1_seed0"


@pytest.fixture
def frontier(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "examples" / "sentiment")
    import frontier

    return frontier


@pytest.fixture
def command(frontier, tmp_path):
    """The command line on a tiny model and a few rows; returns where it writes to."""
    model, data, out = (tmp_path / name for name in ("model", "data", "out"))
    tiny_model().save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    data.mkdir()
    row = dict(prompt="The film was", chosen=" good and nice", rejected=" bad, a sad waste")
    for name, count in (("pairs", 26), ("heldout", 5)):
        rows = [json.dumps(dict(row, id=f"{name}-{i}")) + "\n" for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(rows))
    (data / "heldout_openings.txt").write_text("The plot\nHer voice\nWe saw\n")

    def call(what: str, *only: str, to=out):
        arguments = ["--quick", "--output_dir", str(to), "--data", str(data), "--model", str(model)]
        frontier.main([what, *arguments, *(["--only", *only] if only else [])])
        return to

    return call


def result_of(out, name):
    return json.loads((out / name / "result.json").read_text())


def test_runs_are_made_once_and_reported(frontier, command, monkeypatch, capsys):
    out = command("run", "reference", SEPO, SPARSEPO)
    reference, sepo, sparse = (result_of(out, n) for n in ("reference", SEPO, SPARSEPO))
    assert reference["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert sepo["kl"]["mean"] > 1e-4 and sparse["kl"]["mean"] > 1e-4  # three tiny steps
    assert sepo["kl"]["mean"] > sepo["kl_per_token"]["mean"]  # sums over a response, and means
    assert (len(sepo["rewards"]), len(sepo["kls"])) == (6, 3)  # 3 openings, 2 samples and 1
    assert -1 <= sepo["reward"]["low"] <= sepo["reward"]["high"] <= 1
    assert "mask" not in sepo and 0 <= sparse["mask"]["reward"]["sparsity"] <= 1
    assert (out / SPARSEPO / "metrics.jsonl").exists()
    assert not list(out.glob("*_seed*/model.safetensors"))  # half a gigabyte each, in earnest

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(frontier, "train", never)
    command("run", "reference", SEPO, SPARSEPO)
    assert "3 of 3 runs are whole" in capsys.readouterr().out
    (out / SEPO / "result.json").unlink()  # killed before the end
    with pytest.raises(AssertionError, match="trained again"):
        command("run", SEPO)

    command("report")
    table = (out / "frontier.md").read_text()
    assert f"| sparsepo | beta 0.1 | {sparse['reward']['mean']:.3f} [" in table
    missing = table.split("**Not whole")[1]
    assert SEPO in missing and f"{SPARSEPO}," not in missing
    for name in ("frontier", "sweeps", "masks"):
        assert (out / f"{name}.svg").stat().st_size < 150_000
    assert "sparsepo" in (out / "frontier.svg").read_text()
    assert "mask/reward/sparsity" in (out / "masks.svg").read_text()  # the trainer's name for it


def test_an_oracle_is_made_once_and_sees_its_share(frontier, command, tmp_path):
    names = ("sepo_gamma2_k0.3_oracle25", "sepo_gamma2_k0.3_oracle50")
    out = command("run", *names)
    made = {share: (out / f"oracle{share}" / "result.json") for share in (25, 50)}
    assert [json.loads(file.read_text())["pairs"] for file in made.values()] == [6, 12]
    before = made[25].stat().st_mtime_ns
    (out / f"{names[0]}_seed0" / "result.json").unlink()
    command("run", names[0])
    assert made[25].stat().st_mtime_ns == before
    shared = frontier.Shared(out, tmp_path / "data", tmp_path / "model", frontier.QUICK)
    models = (load_model(str(out / name)) for name in ("../model", "oracle25"))
    expected = score_pairs(shared.pairs, *models, max_tokens=1024)
    for found, whole in zip(shared.scored(25), expected, strict=True):
        assert whole.chosen_score.any()  # it learnt something
        assert (found.chosen_score == whole.chosen_score).all()
        assert (found.rejected_score == whole.rejected_score).all()


def test_a_result_of_other_settings_is_refused(command):
    out = command("run", "reference")
    file = out / "reference" / "result.json"
    result = json.loads(file.read_text())
    result["settings"]["sample_seed"] = 7
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match=r"reference/result.json: expected sample_seed 0, got 7"):
        command("run", "reference")


def test_granularities_differ_in_the_tokens_alone(frontier):
    """Data, model, optimiser and loss are the same, and so is the oracle; three seeds each."""
    from frontier_grid import TRAIN, granularities

    kinds = granularities()
    names = [run.name for runs in kinds.values() for run in runs]
    assert len(set(names)) == len(names) and {*names} <= {run.name for run in frontier.grid()}
    for (loss, _), runs in kinds.items():
        assert [run.arguments["seed"] for run in runs] == [0, 1, 2]
        for run in runs:
            assert TRAIN.items() <= run.arguments.items()
            assert run.oracle_share in (None, 100)
            if loss == "SePO":  # SimPO's is the same: beta is gamma, and their product lambda
                scale = run.arguments.get("gamma", run.arguments.get("beta"))
                ratio = run.arguments.get("gamma_beta_ratio")
                margin = run.arguments["margin"] if ratio is None else scale * ratio
                assert (scale, margin) == (2.0, 0.5)
            else:
                assert run.arguments["beta"] == 0.1


def test_the_granularity_table_by_hand(frontier, tmp_path):
    from frontier_granularity import Kind, beyond_all, draw_granularity, granularity_table

    rng = np.random.default_rng(0)
    base = rng.normal(0.2, 0.3, (3, 50))
    some = base + 0.1  # of the very same openings: the difference has no spread
    kinds = [
        Kind("DPO", "all", [0, 1, 2], base, np.ones((3, 50))),
        Kind("DPO", "some", [0, 2], some[[0, 2]], np.full((2, 50), 2.0)),
    ]
    assert beyond_all(kinds[0], kinds) is None
    assert beyond_all(kinds[1], kinds) == pytest.approx((0.1, 0.1, 0.1))
    first, second = granularity_table(kinds).splitlines()[2:]
    assert (
        first.startswith(f"| DPO | all | 0, 1, 2 | {base.mean():.3f} [") and "1.00 [1.00" in first
    )
    assert "| DPO | some | 0, 2 |" in second and "| +0.100 [+0.100, +0.100] | 2.00 [" in second
    draw_granularity(kinds, tmp_path / "granularity.svg")
    assert (tmp_path / "granularity.svg").exists()


def test_rules_are_trained_and_compared(command):
    names = ("confpo_beta2_ratio0.25_seed0", "simpo_beta2_ratio0.25_seed0", "selective-dpo_beta0.1")
    out = command("run", *names, "sparsepo-random_beta0.1_seed0")
    assert result_of(out, "sparsepo-random_beta0.1_seed0").get("mask") is None
    command("report")
    table = (out / "granularity.md").read_text()
    assert "| SePO | below the mean probability | 0 |" in table
    assert "| DPO | 40 % that lag behind | 0, 1, 2 |" in table
    assert "TDPO1: weighed at random" in (out / "granularity.svg").read_text()


def test_what_another_process_holds_is_left_to_it(frontier, command, tmp_path, capsys):
    out = tmp_path / "out"
    with frontier.lock(out, "reference") as mine:
        assert mine
        command("run", "reference")
    assert "another process is at it" in capsys.readouterr().out
    assert not (out / "reference").exists()
    with frontier.lock(out, "reference") as mine:  # let go
        assert mine


def test_first_third_holds_every_method_once(frontier):
    from frontier_grid import METHODS

    runs = frontier.grid()
    assert len({run.name for run in runs}) == len(runs)
    assert {run.label for run in runs[: len(runs) // 3]} == {"reference", *METHODS}
    for label, (arguments, _, values) in METHODS.items():
        points = [r for r in runs if r.label == label and r.part == "frontier"]
        assert [run.strength[1] for run in points] == list(values)
        assert all(arguments.items() <= run.arguments.items() for run in points)
    # one protocol: nothing but a method's own arguments tells its training from another's
    same = ("learning_rate", "num_train_epochs", "pairs_per_step", "max_grad_norm")
    protocols = {
        tuple(run.arguments[name] for name in same)
        for run in runs
        if run.part not in ("reference", "mask", "rate")
    }
    assert len(protocols) == 1


def test_shards_hold_every_run_once(frontier):
    with pytest.raises(SystemExit):
        frontier.parse_args(["run", "--shard", "2/2"])
    runs = frontier.grid()
    shards = [frontier.parse_args(["run", "--shard", f"{i}/3"]).shard for i in range(3)]
    parts = [run.name for i, n in shards for run in runs[i::n]]
    assert sorted(parts) == sorted(run.name for run in runs)


def test_frontier_by_hand(frontier):
    from frontier_grid import make_run
    from frontier_report import frontier as best

    points = {0.1: (1.0, 0.2), 0.2: (2.0, 0.1), 0.3: (2.0, 0.5), 0.4: (3.0, 0.5), 0.5: (4.0, 0.6)}
    runs = [make_run("frontier", "dpo", beta) for beta in points]
    results = {
        run.name: {"kl": {"mean": kl}, "reward": {"mean": reward}}
        for run, (kl, reward) in zip(runs, points.values(), strict=True)
    }
    # 0.2 has less reward for more divergence; 0.4 has as much as 0.3 for more
    assert [run.strength[1] for run in best(results, runs)] == [0.1, 0.3, 0.5]


def test_mask_summary_by_hand(frontier):
    from frontier_masks import summary

    masks = [np.array([2.0, 0.0, 1.0]), np.array([4.0, 0.0, 0.0, 1.0])]
    known = [np.array([True, False, False]), np.array([True, True, False, False])]
    found = summary(masks, known)
    assert found["sparsity"] == pytest.approx(3 / 7)
    assert (found["mean_words"], found["mean_others"]) == pytest.approx((2.0, 0.5))
    assert found["ratio"] == pytest.approx(4.0)
    # of two pairs a draw holds one of them alone, or both: 2 / 0.5, 2 / 0.5, 2 / 0.5
    assert found["ratio_ci95"] == pytest.approx([4.0, 4.0])
    nothing = summary([np.zeros(3)], known[:1])
    assert nothing["sparsity"] == 1 and nothing["ratio"] is None


def test_what_the_states_tell_of_the_words(frontier, command, tmp_path, capsys):
    import frontier_probe

    out = command("run", SPARSEPO)
    capsys.readouterr()
    places = ("--output_dir", out, "--model", tmp_path / "model", "--data", tmp_path / "data")
    frontier_probe.main([str(part) for part in places])
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[2].startswith(f"| {SPARSEPO}, reward |") and "regression on layer 2 of 2" in lines[-1]
    )
    # every pair is the same one, so what follows a state is known
    assert lines[-1].count("AUC 1.00") == 2


def test_auc_by_hand(frontier):
    from frontier_probe import auc

    labels = np.array([False, True, False, True])
    assert auc(np.array([0.0, 1.0, 0.5, 2.0]), labels) == 1
    assert auc(np.array([3.0, 1.0, 0.5, 2.0]), labels) == 0.5
    assert auc(np.zeros(4), labels) == 0.5
