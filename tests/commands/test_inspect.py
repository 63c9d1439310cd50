import csv
import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
from manifests import manifest
from processes import ROOT
from tiny_trainer import make_trainer
from tokenizers_for_tests import chatml_tokenizer, llama2_tokenizer, plain_tokenizer
from whole_stores import flip

from sepo.commands import inspect, main
from sepo.data import ScoredPair
from sepo.data.selection import Selection
from sepo.data.store.store import StoreWriter, pairs_hash, template_hash, tokenizer_hash
from sepo.errors import InputError
from sepo.flags.parser import Parser


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    if find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model(tmp_path):
    plain_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(data, *argv) -> None:
    parser = Parser()
    inspect.add_arguments(parser)
    inspect.run(parser.parse_args([str(a) for a in ("--dataset_name", data, *argv)]))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Terminal(io.StringIO):
    def isatty(self):
        return True


def scored() -> ScoredPair:
    encode = lambda text: np.array(plain_tokenizer()(text)["input_ids"], np.int32)
    pair = {"prompt": encode("Q"), "chosen": encode("abcde"), "rejected": encode("xyz")}
    return ScoredPair(
        id="r",
        **pair,
        chosen_score=np.array([0, 5, 4, 0, 0], np.float32),
        rejected_score=np.array([1, 2, -3], np.float32),
    )


def test_raw_data_shows_boundaries_and_counts(tmp_path, model, capsys):
    rows = [
        {"prompt": "Tell me\nnow:", "chosen": " a\x1b[2Jb", "rejected": " b"},
        {"prompt": "Tell me:", "chosen": "", "rejected": " b"},
        {"prompt": "Tell me:", "chosen": " c", "rejected": " d"},
    ]
    run(write(tmp_path / "rows.jsonl", *rows), "--model_name_or_path", model, "--rows", 1)
    out = capsys.readouterr().out
    assert "  prompt   Tell me⏎\n           now:|\n" in out
    assert "  rejected  b<|endoftext|>|\n" in out
    assert "a\\x1b[2Jb<|endoftext|>|" in out and "\x1b" not in out
    assert out.count("prompt,") == 1  # one row was asked for
    assert "3 rows read" in out and "1 a response is empty (pair 1)" in out


def test_cuts_are_named_at_the_row(tmp_path, model, capsys):
    row = {"prompt": "Tell me:", "chosen": " a b c d e f g h", "rejected": " b"}
    path = write(tmp_path / "rows.jsonl", row)
    run(path, "--model_name_or_path", model, "--max_length", 9)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("pair 0: ") and first.endswith("; chosen cut at max_length")


def test_keys_and_limit(tmp_path, model, capsys):
    row = {"q": "Tell me:", "better": " a", "worse": " b"}
    path = write(tmp_path / "rows.jsonl", row, row)
    keys = ["--prompt_key", "q", "--chosen_key", "better", "--rejected_key", "worse"]
    run(path, "--model_name_or_path", model, "--limit", 1, *keys, "--append_eos", "false")
    out = capsys.readouterr().out
    assert "1 rows read" in out and "  chosen    a|\n" in out


def test_the_users_own_weights_are_highlighted(tmp_path, model, capsys):
    prompt, chosen = plain_tokenizer()(["Q", "ab"])["input_ids"]
    row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": [3]}
    row |= {"chosen_mask": [0, 1], "rejected_mask": [1]}
    run(write(tmp_path / "rows.jsonl", row), "--model_name_or_path", model)
    out = capsys.readouterr().out
    assert "  chosen   a┊⟦b⟧|\n" in out
    assert "2 of 3 response tokens selected (66.7%)" in out
    assert "6 tokens padded, 4 packed, 2 packed and truncated" in out


def write_store(path):
    tokenizer = plain_tokenizer()
    whose = {"tokenizer": tokenizer_hash(tokenizer), "chat_template": template_hash(tokenizer)}
    writer = StoreWriter(path, manifest(source=pairs_hash([scored()]), **whose))
    writer.write(0, [scored()])
    assert writer.finish()


def test_a_scored_store_shows_what_is_selected(tmp_path, model, capsys):
    write_store(tmp_path / "store")
    run(tmp_path / "store", "--model_name_or_path", model, "--fraction", 0.4)
    out = capsys.readouterr().out
    # two of five, the highest; one of three, the lowest; nothing is read after the one before
    assert "  chosen   a⟦b⟧┊⟦c⟧de|" in out
    assert "  rejected xy┊⟦z⟧|" in out
    assert "3 of 8 response tokens selected (37.5%): 2 of 5 chosen, 1 of 3 rejected\n" in out
    assert "12 tokens padded, 9 packed, 5 packed and truncated" in out


@pytest.mark.parametrize(
    ("flags", "chosen", "rejected"),
    [
        (["--select", "mass"], "a⟦b⟧┊⟦c⟧de|", "xy┊⟦z⟧|"),
        (["--select", "mass", "--mass", 0.5], "a┊⟦b⟧cde|", "xy┊⟦z⟧|"),
        (["--fraction", 0.2, "--rejected_fraction", 1], "a┊⟦b⟧cde|", "⟦xy⟧┊⟦z⟧|"),
        (["--fraction", 1, "--first_token", "released"], "a⟦bcd⟧┊⟦e⟧|", "x⟦y⟧┊⟦z⟧|"),
    ],
)
def test_other_selections(tmp_path, model, capsys, flags, chosen, rejected):
    write_store(tmp_path / "store")
    run(tmp_path / "store", "--model_name_or_path", model, *flags)
    out = capsys.readouterr().out
    assert f"  chosen   {chosen}" in out and f"  rejected {rejected}" in out


def test_the_csv_of_the_released_code(tmp_path, capsys):
    tokenizer = llama2_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    ids = [tokenizer(f"[INST] Tell me [/INST]{text}</s>")["input_ids"] for text in ("ab", "xyz")]
    row = {"prompt": "Tell me", "chosen_response": "ab</s>", "rejected_response": "xyz</s>"}
    row |= {"chosen_selected_args": "0", "chosen_selected_ids": str(ids[0][-3])}
    row |= {
        "rejected_unselected_args": "0,2",
        "rejected_unselected_ids": f"{ids[1][-4]},{ids[1][-2]}",
    }
    with (tmp_path / "top.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    run(tmp_path / "top.csv", "--model_name_or_path", tmp_path / "model")
    out = capsys.readouterr().out
    assert "  chosen   a┊⟦b⟧</s>|" in out and "  rejected x⟦y⟧z┊⟦</s>⟧|" in out
    assert "3 of 7 response tokens selected (42.9%): 1 of 3 chosen, 2 of 4 rejected\n" in out


def test_colours_only_on_a_terminal_and_not_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    inspect.Show(plain_tokenizer(), out, inspect.USUAL).pair(scored())
    assert "\x1b[7mb\x1b[0m" in out.getvalue() and "⟦" not in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    inspect.Show(plain_tokenizer(), out, inspect.USUAL).pair(scored())
    assert "\x1b" not in out.getvalue() and "⟦b⟧" in out.getvalue()


@pytest.mark.parametrize("make", [chatml_tokenizer, llama2_tokenizer, plain_tokenizer])
def test_marked_text_is_the_decoded_text(make):
    tokenizer = make()
    encode = lambda text: np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    chosen = encode(" The river is wide é😀.")
    score = np.random.default_rng(0).normal(size=len(chosen)).astype(np.float32)
    pair = ScoredPair(
        id="r",
        prompt=encode("Tell me"),
        chosen=chosen,
        rejected=chosen,
        chosen_score=score,
        rejected_score=score,
    )
    out = io.StringIO()
    inspect.Show(tokenizer, out, Selection("selected", fraction=0.5)).pair(pair)
    line = next(x for x in out.getvalue().splitlines() if x.startswith("  chosen"))
    text = line[11:-1].translate(dict.fromkeys(map(ord, "⟦⟧┊")))
    whole = tokenizer.decode([*pair.prompt, *chosen])
    assert text.startswith(" The river is wide ") and whole.endswith(text[:19] + "é😀.")
    assert line.count("⟦") == line.count("⟧") > 0 and line.count("┊") == 1


def test_messages(tmp_path, model):
    with pytest.raises(InputError, match="can't load a tokenizer from"):
        run("rows.jsonl", "--model_name_or_path", tmp_path / "nothing")
    with pytest.raises(InputError, match="no such file or directory: rows.jsonl"):
        run("rows.jsonl", "--model_name_or_path", model)
    with pytest.raises(InputError, match=r"--mass: expected a number in \(0, 1\], got 0"):
        run("rows.jsonl", "--model_name_or_path", model, "--select", "mass", "--mass", 0)
    with pytest.raises(InputError, match="--rows: expected a whole number of at least 0, got -1"):
        run("rows.jsonl", "--model_name_or_path", model, "--rows", -1)


def test_verify_reads_a_whole_store(tmp_path, capsys):
    write_store(tmp_path / "store")
    run(tmp_path / "store", "--verify")
    assert (
        capsys.readouterr().out == f"{tmp_path / 'store'}: as it was written: 1 pairs, 9 tokens\n"
    )
    part = next((tmp_path / "store").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{part.name}: cannot be read"):
        run(tmp_path / "store", "--verify")


def test_verify_says_what_it_can_not_see(capsys):
    old = ROOT / "tests/fixtures/old_store"
    run(old, "--verify")
    out = capsys.readouterr().out
    assert out.startswith(f"{old}: whole, but not all of it has checksums: 3 pairs, ")


def test_verify_reads_a_checkpoint(tmp_path, capsys):
    make_trainer(tmp_path, method="sft", max_steps=1, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoint-1"
    capsys.readouterr()
    run(path, "--verify")
    assert capsys.readouterr().out == f"{path}: as it was written: step 1\n"
    flip(path / "model.safetensors", 8 * 1000)
    with pytest.raises(InputError, match="not a complete checkpoint: model.safetensors: its cont"):
        run(path, "--verify")


def test_verify_of_what_has_no_checksums(tmp_path):
    with pytest.raises(InputError, match="expected a scored store or a checkpoint, found no mani"):
        run(tmp_path, "--verify")
    with pytest.raises(InputError, match="--model_name_or_path: expected whose tokenizer"):
        run(tmp_path)


def test_data_without_a_flag_is_said(tmp_path, model, capsys, caplog):
    write_store(tmp_path / "store")
    for argv, line in (
        (["--model_name_or_path", model], "DATA is now sepo inspect --dataset_name DATA"),
        (["--verify"], "PATH --verify is now sepo inspect --verify PATH"),
    ):
        caplog.clear()
        main.run(["inspect", str(tmp_path / "store"), *argv])
        assert caplog.messages == [f"sepo inspect {line}"]
    old = capsys.readouterr().out
    caplog.clear()
    main.run(["inspect", "--dataset_name", str(tmp_path / "store"), "--model_name_or_path", model])
    main.run(["inspect", "--verify", str(tmp_path / "store")])
    assert capsys.readouterr().out == old and caplog.messages == []
    with pytest.raises(InputError, match="--dataset_name: expected the data to look at, got none"):
        main.run(["inspect", "--model_name_or_path", model])
    for flag in ("--dataset_name", "--verify"):
        with pytest.raises(InputError, match="expected one path, got one and two"):
            main.run(["inspect", "two", flag, "one", "--model_name_or_path", model])


def test_old_words_for_a_selection(tmp_path, model, capsys, caplog):
    write_store(tmp_path / "store")
    run(tmp_path / "store", "--model_name_or_path", model, "--fraction", "mass", "--mass", 0.5)
    assert "  chosen   a┊⟦b⟧cde|" in capsys.readouterr().out
    assert caplog.messages == ["--fraction mass is now --select mass"]
