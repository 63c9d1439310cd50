"""More bad inputs: files that are none, names, numbers beyond any bound, YAML's oddities, environments."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.bad_inputs import COMMANDS, MODEL, READERS, STORES, TRAIN, Case

ROW = dict(prompt="w3 w4", chosen="w5 w6", rejected="w7")
IDS = dict(prompt_ids=[3], chosen_ids=[4, 5], rejected_ids=[6])
LONG = "n" * 300  # no file system has room for such a name
HUGE = "1" + "0" * 30


def odd_cases() -> list[Case]:
    return [
        *data_that_is_no_file(),
        *data_of_odd_text(),
        *stores_and_models(),
        *outputs(),
        *numbers(),
        *yaml_files(),
        *environments(),
    ]


def data_that_is_no_file() -> Iterator[Case]:
    def folder_in_itself(path: Path) -> None:
        path.mkdir()
        (path / "again").symlink_to(path)

    made = {
        "fifo.jsonl": os.mkfifo, "folder.jsonl": Path.mkdir, "folder.parquet": Path.mkdir,
        "loop.jsonl": lambda path: path.symlink_to(path), "loop": lambda path: path.symlink_to(path),
        "nowhere.csv": lambda path: path.symlink_to("nothing"), "itself": folder_in_itself,
        "fifos": lambda path: (path.mkdir(), os.mkfifo(path / "train.jsonl")),
        "zero.jsonl": lambda path: path.symlink_to("/dev/zero"),
    }  # fmt: skip
    for name, make in made.items():
        write = lambda home, tmp, name=name, make=make: make(tmp / name)
        for command, argv in READERS.items():
            yield _at(f"{command} of {name}", argv, f"TMP/{name}", write, process="fifo" in name)
    for place in (f"TMP/{LONG}.jsonl", LONG, "~nobody-of-that-name/pairs.jsonl", "", " ", "/", "a\nb",
                  "TMP/\udcff.jsonl", "../../../../nothing.csv", "-", "/dev/null", "hf://a/b"):  # fmt: skip
        for command, argv in READERS.items():
            yield _at(f"{command} of {place[:40]!r}", argv, place)


def data_of_odd_text() -> Iterator[Case]:
    row, line = json.dumps(ROW), lambda **more: json.dumps({**ROW, **more})
    ids = lambda **more: json.dumps({**IDS, **more})
    huge = int(HUGE)
    for name, content in {
        "utf16.jsonl": row.encode("utf-16"), "utf16.csv": "prompt,chosen,rejected\na,b,c".encode("utf-16"),
        "utf32.json": f"[{row}]".encode("utf-32"), "cr.jsonl": f"{row}\r{row}\r", "crlf.jsonl": "\r\n\r\n",
        "gzip.jsonl": b"\x1f\x8b\x08\x00\x00\x00", "zip.json": b"PK\x03\x04", "nul.jsonl": b"\x00" * 64,
        "object.json": json.dumps(ROW | {"chosen": {}}), "of_data.json": f'{{"data": [{row}]}}',
        "comma.json": f"[{row},]", "comment.jsonl": f"// rows\n{row}\n", "single.jsonl": str(ROW),
        "digits.jsonl": row.replace('"w7"', "9" * 5000), "deep.jsonl": '{"prompt": ' * 100_000,
        "huge_id.jsonl": ids(chosen_ids=[huge]), "large_id.jsonl": ids(chosen_ids=[2**31]),
        "real_id.jsonl": ids(chosen_ids=[4.5]), "true_id.jsonl": ids(chosen_ids=[True]),
        "text_ids.jsonl": ids(chosen_ids="4 5"), "deep_ids.jsonl": ids(chosen_ids=[[4]]),
        "beyond_vocabulary.jsonl": ids(chosen_ids=[61]), "object_ids.jsonl": ids(chosen_ids={"0": 4}),
        "nan_weight.jsonl": ids(chosen_weights=[float("nan"), 1]),
        "inf_weight.jsonl": ids(chosen_weights=[float("inf"), 1]),
        "negative_weight.jsonl": ids(chosen_weights=[-1, 1]),
        "zero_weights.jsonl": ids(chosen_weights=[-0.0, 0]),
        "huge_weight.jsonl": ids(chosen_weights=[10**400, 1]),
        "large_weight.jsonl": ids(chosen_weights=[1e300, 1]),
        "short_weights.jsonl": ids(chosen_weights=[1]), "mask_of_text.jsonl": ids(chosen_mask="11"),
        "surrogate.jsonl": line(chosen="\ud800"), "system_of_number.jsonl": line(system=7),
        "unclosed.csv": 'prompt,chosen,rejected\n"a,b,c\n', "twice.csv": "prompt,chosen,chosen\na,b,c\n",
        "more.csv": "prompt,chosen,rejected\na,b,c,d\n", "fewer.csv": "prompt,chosen,rejected\na,b\n",
        "semicolon.csv": "prompt;chosen;rejected\na;b;c\n", "cr.csv": "prompt,chosen,rejected\r",
        "nul.csv": "prompt,chosen,rejected\na,\x00,\x00\n",
        "key_twice.jsonl": '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n',
    }.items():  # fmt: skip
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        write = lambda home, tmp, name=name, data=data: (tmp / name).write_bytes(data)
        for command, argv in READERS.items():
            if command != "inspect" or not name.startswith("beyond"):  # which shows them
                yield _at(f"{command} of {name}", argv, f"TMP/{name}", write)
    for name in ("state.json", "dataset_dict.json", "dataset_info.json"):
        for content in (b"", b"{}", b"[]", b"\xff"):
            write = lambda home, tmp, name=name, content=content: _write(
                tmp / "saved" / name, content
            )
            argv = READERS["inspect"]
            yield _at(f"inspect of a saved {name} {content!r}", argv, "TMP/saved", write)


def stores_and_models() -> Iterator[Case]:
    part, zero = "part-00000-of-00001.parquet", lambda path: path.symlink_to("/dev/zero")
    for command, file, make in (
        ("train", part, os.mkfifo), ("transfer", part, zero), ("inspect", part, os.mkfifo),
        ("report", "manifest.json", os.mkfifo), ("score", "manifest.json", zero),
    ):  # fmt: skip
        change = lambda home, tmp, file=file, make=make: _instead(home, tmp, "store", file, make)
        id = f"{command}, {file[:4]} is a {'fifo' if make is os.mkfifo else 'zero'}"
        yield _at(id, STORES[command], "TMP/store", change, process=True)
    for encoding in ("utf-16", "utf-32"):
        change = lambda home, tmp, encoding=encoding: _instead(
            home, tmp, "store", "manifest.json",
            lambda path: path.write_text(
                (home / "store/manifest.json").read_text(), encoding=encoding
            ),
        )  # fmt: skip
        for command, argv in STORES.items():
            yield _at(f"{command}, manifest in {encoding}", argv, "TMP/store", change)
    readers = {
        "train": (*TRAIN, "--model_name_or_path", "TMP/model"),
        "score": (*COMMANDS["score"], "--reference", "TMP/model"),
    }
    for file, make in (
        ("config.json", os.mkfifo), ("model.safetensors", os.mkfifo), ("tokenizer.json", Path.mkdir),
    ):  # fmt: skip
        change = lambda home, tmp, file=file, make=make: _instead(home, tmp, "model", file, make)
        yield _at(f"train, {file} is none", readers["train"], "", change, process=True)
    for key, value in (
        ("hidden_size", 0), ("hidden_size", -1), ("hidden_size", "wide"), ("hidden_size", 1e400),
        ("num_attention_heads", 0), ("num_attention_heads", 5), ("num_hidden_layers", -1),
        ("num_hidden_layers", "two"), ("vocab_size", 0), ("vocab_size", -5), ("vocab_size", None),
        ("vocab_size", "many"), ("hidden_act", "sharp"), ("hidden_act", 7), ("rms_norm_eps", "x"),
        ("dtype", "float7"), ("rope_parameters", []), ("rope_parameters", {"rope_type": 5}),
        ("rope_parameters", {"rope_type": "unheard"}), ("model_type", 7), ("model_type", ""),
        ("quantization_config", 7), ("quantization_config", {"quant_method": "unheard"}),
        ("num_key_value_heads", 3),
    ):  # fmt: skip
        change = lambda home, tmp, key=key, value=value: _config(home, tmp, {key: value})
        for command, argv in readers.items():
            if command == "score" and value == {"quant_method": "unheard"}:
                continue  # scored as the plain weights that they are
            yield _at(f"{command}, config's {key} {json.dumps(value)}", argv, "", change)
    for content in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": "../x"}}, [],
                    {"weight_map": {"a": 7}}, {"weight_map": {"a": LONG}}):  # fmt: skip
        change = lambda home, tmp, content=content: _instead(
            home, tmp, "model", "model.safetensors",
            lambda path: (path.parent / "model.safetensors.index.json").write_text(
                json.dumps(content)
            ),
        )  # fmt: skip
        yield _at(f"train, index {json.dumps(content)[:40]}", readers["train"], "", change)
    adapter = dict(
        peft_type="LORA", base_model_name_or_path="HOME/model", r=2, task_type="CAUSAL_LM"
    )
    for content in (b"", b"[]", b"\xff", {**adapter, "peft_type": 7}, {**adapter, "peft_type": "NEW"},
                    {**adapter, "base_model_name_or_path": 7}, {**adapter, "r": "x"}, adapter,
                    {**adapter, "base_model_name_or_path": ["a"]}):  # fmt: skip

        def write(home, tmp, content=content):
            if isinstance(content, dict):
                content = json.dumps(content).replace("HOME", str(home)).encode()
            _write(tmp / "model" / "adapter_config.json", content)

        shown = content if isinstance(content, bytes) else json.dumps(content)[-40:]
        yield _at(f"train, adapter {shown}", readers["train"], "", write)


def outputs() -> Iterator[Case]:
    def loop(home, tmp):
        (tmp / "loop").symlink_to(tmp / "loop")

    def fifo(home, tmp):
        os.mkfifo(tmp / "fifo")

    def locked(home, tmp):
        for name in (".sepo.lock", ".transfer.lock", ".shard0of1.lock", ".demo.lock"):
            (tmp / "held" / name).mkdir(parents=True)

    for command in ("train", "score", "transfer", "demo", "report"):
        flag = "--output" if command == "report" else "--output_dir"
        below = "/page.html" if command == "report" else ""
        for place, write in (
            (f"TMP/loop{below}", loop), (f"TMP/{LONG}{below}", None), (f"TMP/fifo{below}", fifo),
            (f"TMP/fifo/deeper{below}", fifo), (f"/dev/null{below}", None),
            *([("", None)] if command in ("train", "score", "transfer") else []),
            *([("TMP/held", locked)] if command != "report" else [("TMP/fifo", fifo)]),
        ):  # fmt: skip
            argv = (*COMMANDS[command], flag, place)
            yield _at(f"{command} into {place[:30]!r}", argv, "", write)


def numbers() -> Iterator[Case]:
    for command, flags in {
        "transfer": ("pairs_per_part", "max_length"),
        "demo": ("seed",),
    }.items():
        for flag in flags:
            yield Case(f"odd {command} --{flag}={HUGE}", (*COMMANDS[command], f"--{flag}={HUGE}"))
    for flag in ("max_steps", "num_train_epochs", "save_total_limit", "head_budget", "lora_r",
                 "pairs_per_step"):  # fmt: skip
        more = ("--use_peft",) if flag == "lora_r" else ()
        yield Case(f"odd train --{flag}={HUGE}", (*TRAIN, *more, f"--{flag}={HUGE}"))
    for words in (
        ("--gamma=1e400",), ("--beta=-0.0", "--method=simpo"),
        ("--fraction=1e-400",), ("--seed=-0.0",), ("--num_train_epochs=1e308",), ("--max_length=-0",),
        ("--adam_epsilon=-1",), ("--max_grad_norm=-1",), ("--weight_decay=-1",), ("--lora_alpha=0x10",),
        ("--resume_from_checkpoint=",), ("--model_name_or_path=",), ("--dataset_name=",),
        ("--config=",), ("--method=",), ("--optim=",), ("--eval_dataset_name=",),
    ):  # fmt: skip
        yield Case(f"odd train {' '.join(words)}", (*TRAIN, *words))
    for words in (("--shard", "0/-0"), ("--limit", "0x1")):
        yield Case(f"odd score {' '.join(words)}", (*COMMANDS["score"], *words))


def yaml_files() -> Iterator[Case]:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (
        "seed: 2020-01-01", "seed: 1:30", "seed: 0o10x", "learning_rate: 1_0.0.0", "seed: ~",
        "max_steps: 123456789012345678901234567890", "learning_rate: .inf", "gamma: -.inf",
        "seed: !!set {a}", "seed: !!omap [a: 1]", "no: 1", "yes: 1", "2020-01-01: 1", "? [a]\n: 1",
        "method: no", "method: ~", "model_name_or_path: 7",
        "dataset_name: \"a\\0b\"", "model_name_or_path: \"a\\0b\"", "lr_scheduler_type: no", "optim: yes",
        "seed: &a 1\ndata_seed: *b", "--- \n...\n---\nseed: 1", "seed: '1'x", "%YAML 9.9\n---\nseed: 1",
        "seed: \"\\ud800\"", "run_name: [a", "\ufeff: 1", "warmup_steps: no", "fraction: 30%", bomb,
        "learning_rate: 1e-3 # fast\n learning_rate: 2", "save_steps: -0", "seed: 0x1g",
        "x" * 5000 + ": 1", "max_grad_norm: {}", "attn_impl: no", "dtype: no", "bf16: maybe no",
    ):  # fmt: skip
        write = lambda home, tmp, text=text: (tmp / "run.yaml").write_text(text)
        needed = ("--model_name_or_path", MODEL, "--dataset_name", "HOME/store", "--output_dir")
        if text.startswith(("model_", "dataset_", "output_")):
            name = text.split(":")[0]
            i = needed.index(f"--{name}")
            needed = (*needed[:i], *needed[i + 2 :])
        last = ("TMP/out",) if needed and needed[-1] == "--output_dir" else ()
        argv = ("train", "--use_cpu", "--config", "TMP/run.yaml", *needed, *last)
        yield Case(f"odd yaml {text[:40]!r}", argv, write)


def environments() -> Iterator[Case]:
    lone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for command, setting in (
        ("train", lone), ("train", lone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}),
        ("train", {"WORLD_SIZE": "-1", "RANK": "0"}), ("score", {"WORLD_SIZE": "0", "RANK": "0"}),
        ("train", {"ACCELERATE_MIXED_PRECISION": "fp17"}), ("score", {"RANK": "-1", "WORLD_SIZE": "2"}),
        ("train", {"ACCELERATE_USE_DEEPSPEED": "true"}), ("train", {"RANK": HUGE}),
    ):  # fmt: skip
        shown = " ".join(f"{name}={value[:9]}" for name, value in setting.items())
        yield Case(f"odd {shown} {command}", COMMANDS[command], environment=setting, process=True)


def _at(
    id: str, argv: tuple, place: str, write: Callable | None = None, *, process: bool = False
) -> Case:
    argv = tuple(word.replace("DATA", place) for word in argv)
    return Case(f"odd {id}", argv, write or (lambda home, tmp: None), process=process)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _instead(home: Path, tmp: Path, what: str, file: str, make: Callable) -> None:
    """A copy of HOME's with something else in the place of one file."""
    shutil.copytree(home / what, tmp / what)
    path = tmp / what / file
    path.unlink()
    make(path)


def _config(home: Path, tmp: Path, change: dict) -> None:
    config = json.loads((home / "model" / "config.json").read_text()) | change
    text = json.dumps(config)
    _instead(home, tmp, "model", "config.json", lambda path: path.write_text(text))
