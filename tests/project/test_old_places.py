"""Every module and every documented name is still importable from where it once stood."""

import importlib
import subprocess
import sys

import pytest
from processes import ENVIRONMENT

from sepo._moved import MOVED

DOCUMENTED = {  # what README, docs and examples have imported, by module
    "sepo": ["SePOConfig", "SePOTrainer"],
    "sepo.config": ["SePOConfig"],
    "sepo.data": ["PackedBatch", "ScoredPair", "Segment", "StepPlan", "TokenPair", "all_positions"]
    + ["num_steps", "pack", "plan_step", "random_positions", "select_positions", "truncate"]
    + ["transfer_scores", "transfer_selection"],
    "sepo.data.files": ["Atomic"],
    "sepo.data.read": ["read_pairs"],
    "sepo.data.segments": ["make_segments"],
    "sepo.data.select": ["random_positions", "select_positions"],
    "sepo.data.store": ["ScoredStore", "StoreWriter", "is_store", "pairs_hash", "read_manifest"],
    "sepo.data.types": ["ScoredPair", "TokenPair"],
    "sepo.errors": ["InputError", "exit_with_one_line"],
    "sepo.masks": ["layer_states", "load_mask"],
    "sepo.methods": ["METHODS"],
    "sepo.model": ["explain_attention", "head", "hidden_states", "load_model", "load_tokenizer"]
    + ["prepare_model", "token_logprob"],
    "sepo.reference": ["cached_reference", "load_reference", "token_logprob_kl"],
    "sepo.response_logp": ["response_logp"],
    "sepo.score": ["score_dataset", "score_pairs"],
    "sepo.trainer": ["SePOTrainer"],
    "sepo.transfer": ["read_preferences", "transfer_store"],
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_is_the_new_one(old):
    assert importlib.import_module(f"sepo.{old}") is importlib.import_module(f"sepo.{MOVED[old]}")


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_names(module):
    loaded = importlib.import_module(module)
    assert [name for name in DOCUMENTED[module] if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("first", ["sepo.config", "sepo.trainer.config"])
def test_either_name_may_come_first(first):
    """Importing under the old name leaves the module's own name and spec."""
    code = (
        f"import {first}, sepo.config, sepo.trainer.config as new, importlib, pickle;"
        "assert sepo.config is new and new.__spec__.name == new.__name__ == 'sepo.trainer.config';"
        "assert new.SePOConfig.__module__ == 'sepo.trainer.config'; importlib.reload(new)"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


@pytest.mark.parametrize("start", [["-m", "sepo.cli"], ["-m", "sepo"]])
def test_old_and_new_ways_to_start_the_command_line(start):
    done = subprocess.run(
        [sys.executable, *start, "--help"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: sepo")


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="No module named 'sepo.nothing'"):
        importlib.import_module("sepo.nothing")
