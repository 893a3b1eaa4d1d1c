"""docs/extend.md, file by file and command by command: what each worked example adds is there and acts."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .pages import ROOT, commands_in, files_in
from .shell import run, workspace

PAGE = ROOT / "docs" / "extend.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
THINGS = {name: part for name, part in SECTIONS.items() if files_in(part)}
KIN = {
    "Sampler": ("generation/samplers.py", "top_a"),
    "Loss": ("models/head.py", "focal"),
    "Optimizer": ("training/options.py", "lion"),
    "Metric": ("evaluation/text.py", "similarity"),
    "Callback": ("training/options.py", "weight_norm"),
    "Data set": ("data/sources.py", "roman"),
    "Format": ("data/formats.py", "reviews"),
    "Adapter": ("models/adapters.py", "norm_gains"),
    "Quantization": ("models/quantize.py", "one_bit"),
}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def values(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in metrics(run_dir) if name in row]


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


# --- quick ----------------------------------------------------------------------------------------------------------


def test_the_page_has_every_example() -> None:
    assert set(THINGS) == {*KIN, "Model"}
    assert set(THINGS) == set(EFFECTS)


@pytest.mark.parametrize("name", THINGS)
def test_an_example_is_one_file_one_yaml_one_test(name: str) -> None:
    files = files_in(THINGS[name])
    folders = [file.split("/")[0] for file in files if "/" in file]
    of_code = [file for file in files if file.startswith("my_lab/")]
    assert len(of_code) == 1
    assert folders.count("my_tests") == 1
    assert folders.count("my_conf") == (2 if name == "Model" else 1), (
        "a model from transformers needs a YAML alone"
    )
    for file, text in files.items():
        if file.endswith(".py"):
            ast.parse(text, file)
    module = of_code[0].removesuffix(".py").replace("/", ".")
    commands = commands_in(THINGS[name], "")
    assert any(f"plugins=[{module}]" in command.text for command in commands)


def test_the_table_names_the_kin() -> None:
    for name, (file, _) in KIN.items():
        assert re.search(rf"\| \[{name.lower()}\]\(#[\w-]+\) \| `{file}`", TEXT), name
        assert (ROOT / "src" / "lmlab" / file).is_file()


# --- what each did --------------------------------------------------------------------------------------------------


def sampled(outputs: Path, out: list[str]) -> None:
    lines = (outputs / "sft/top_a/samples.jsonl").read_text(encoding="utf-8").splitlines()
    texts: dict[str, list[str]] = {}
    for row in map(json.loads, lines):
        texts.setdefault(row["sampler"], []).append(row["text"])
    assert set(texts) == {"greedy", "top_a"}
    assert len(texts["top_a"]) == len(texts["greedy"])
    assert texts["top_a"] != texts["greedy"]
    assert "top_a" in out[1]
    assert "top_a" in out[2] or "answers" in out[2]
    assert "certified" in out[3]


def focal(outputs: Path, out: list[str]) -> None:
    weighed, plain = (values(outputs / "sft" / name, "train/loss")[0] for name in ("focal", "focal0"))
    assert 0 < weighed < plain, "gamma = 2 makes every token count less"
    first = {name: values(outputs / "sft" / name, "val/loss")[0] for name in ("focal", "focal0")}
    assert first["focal"] == first["focal0"], "validation measures the likelihood whatever is trained"


def lion(outputs: Path, out: list[str]) -> None:
    assert "name: lion" in (outputs / "sft/lion/config.yaml").read_text(encoding="utf-8")
    assert "resuming from" in out[1]
    assert summary(outputs / "sft/lion")["steps"] == 4


def similarity(outputs: Path, out: list[str]) -> None:
    found = values(outputs / "sft/similarity", "val/similarity")
    assert len(found) == 2
    assert all(0 <= value <= 1 for value in found)


def weight_norm(outputs: Path, out: list[str]) -> None:
    found = values(outputs / "sft/weight_norm", "weights/norm")
    assert len(found) >= 2
    assert found[0] != found[-1]


def roman(outputs: Path, out: list[str]) -> None:
    report = json.loads((outputs / "sft/roman/data_report.json").read_text(encoding="utf-8"))
    assert report["records_read"] == 300
    assert "Write as a Roman numeral." in (outputs / "sft/roman/mask_preview.txt").read_text(encoding="utf-8")
    assert values(outputs / "sft/roman", "val/exact_match")


def reviews(outputs: Path, out: list[str]) -> None:
    preview = (outputs / "sft/reviews/mask_preview.txt").read_text(encoding="utf-8")
    assert re.search(r"Review of a \w+\n⟦\d of 5: ", preview), preview


def norm_gains(outputs: Path, out: list[str]) -> None:
    told = summary(outputs / "sft/norm_gains")
    config = json.loads((ROOT / "assets/tiny-base/config.json").read_text(encoding="utf-8"))
    assert told["model/params_trainable"] == config["hidden_size"] * (2 * config["num_hidden_layers"] + 1)
    assert (outputs / "sft/norm_gains/model/model.safetensors").is_file()
    assert out[1].strip()


def one_bit(outputs: Path, out: list[str]) -> None:
    bits = summary(outputs / "sft/one_bit")["model/base_bits_per_param"]
    assert 1 < bits < 1.25, "a bit, and a scale of 32 for each row"
    assert "merged" in out[1]
    assert "certified" in out[2]
    assert (outputs.parent / "exports/one_bit/model.safetensors").is_file()


def models(outputs: Path, out: list[str]) -> None:
    kinds = {
        name: json.loads((outputs / f"pretrain/{name}/model/config.json").read_text(encoding="utf-8"))[
            "model_type"
        ]
        for name in ("qwen3_tiny", "scaled")
    }
    assert kinds == {"qwen3_tiny": "qwen3", "scaled": "scaled_llama"}
    assert "Say the" in out[2]


EFFECTS: dict[str, Callable[[Path, list[str]], None]] = {
    "Sampler": sampled,
    "Loss": focal,
    "Optimizer": lion,
    "Metric": similarity,
    "Callback": weight_norm,
    "Data set": roman,
    "Format": reviews,
    "Adapter": norm_gains,
    "Quantization": one_bit,
    "Model": models,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, where its commands can be typed."""
    folder = workspace(tmp_path_factory.mktemp("lab") / "work")
    for name, text in files_in(TEXT).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", THINGS)
def test_the_commands_do_what_the_page_says(lab: Path, name: str) -> None:
    told = []
    for command in commands_in(THINGS[name], PAGE.name):
        done = run(command.text, lab)
        assert done.returncode == 0, (command.text, done.stdout[-2000:], done.stderr[-2000:])
        told.append(done.stdout + done.stderr)
    EFFECTS[name](lab / "outputs", told)


@pytest.mark.slow
def test_several_at_once(lab: Path) -> None:
    tests, sweep = commands_in(SECTIONS["Several at once"], PAGE.name)
    done = run(tests.text, lab)
    assert done.returncode == 0, done.stdout
    assert "13 passed" in done.stdout or re.search(r"\b1\d passed", done.stdout), done.stdout
    done = run(sweep.text, lab)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = (lab / "outputs/sweeps").glob("*/results.csv")
    assert table.read_text(encoding="utf-8").count("finished") == 2


@pytest.mark.slow
def test_a_plugin_s_adapter_refuses_in_one_line(lab: Path) -> None:
    command = commands_in(THINGS["Adapter"], PAGE.name)[0].text.replace(
        "run_name=norm_gains", "run_name=refused"
    )
    done = run(command, lab, append=["quant=int8"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: adapter=norm_gains over quant=int8")
    assert done.stderr.count("\n") == 1
    assert not (lab / "outputs/sft/refused").exists()


@pytest.mark.slow
def test_all_of_them_inside_lmlab(tmp_path: Path) -> None:
    """The same code at the end of its kin's file, the same YAML in conf: no plugin, and nothing else is changed."""
    for name in ("src", "conf", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    for name, (kin, _) in KIN.items():
        for file, text in files_in(THINGS[name]).items():
            if file.startswith("my_lab/"):
                place = tmp_path / "src" / "lmlab" / kin
                body = text.replace("from __future__ import annotations\n", "")
                own = "lmlab." + kin.removesuffix(".py").replace("/", ".")
                body = re.sub(rf"^from {re.escape(own)} import .*\n", "", body, flags=re.MULTILINE)
                place.write_text(place.read_text(encoding="utf-8") + "\n\n" + body, encoding="utf-8")
            elif file.startswith("my_conf/"):
                target = tmp_path / file.replace("my_conf", "conf")
                target.write_text(text, encoding="utf-8")
    (tmp_path / "reviews.jsonl").write_text(files_in(TEXT)["reviews.jsonl"], encoding="utf-8")
    chosen = ["sampler=top_a", "samples.grid=[top_a]", "loss=focal", "optim=lion", "metrics=similarity"]
    chosen += [
        "callbacks=weight_norm",
        "quant=one_bit",
        "data=reviews",
        "data.path=reviews.jsonl",
        "data.val_fraction=0.3",
    ]
    short = ["trainer.max_steps=2", "trainer.val_every_n_steps=2", "logger=none", "run_name=all"]
    done = subprocess.run(
        [sys.executable, "train.py", *chosen, *short],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = tmp_path / "outputs"
    assert values(outputs / "sft/all", "val/similarity")
    assert values(outputs / "sft/all", "weights/norm")
    assert 1 < summary(outputs / "sft/all")["model/base_bits_per_param"] < 1.25
    assert '"sampler": "top_a"' in (outputs / "sft/all/samples.jsonl").read_text(encoding="utf-8")
