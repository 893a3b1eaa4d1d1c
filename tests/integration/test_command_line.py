"""`python train.py adapter=qlora quant=nf4` as a user types it: files, numbers, W&B, and its adapter used elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmlab.journal import RunDir, read_json
from lmlab.records import SAMPLE_FIGURES
from tests.integration.conftest import ROOT, command, lines

METRICS = {
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "train/flops",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
    "val/exact_match",
    "perf/tokens_per_second",
    "memory/rss_gb",
    *(
        f"memory/{phase}/peak_gb"
        for phase in ("load", "forward", "backward", "optimizer", "eval", "generate")
    ),
}
"""Every metric name of design.md that applies to a CPU; planned memory and MFU come with the memory plan."""


@pytest.fixture(scope="session")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, subprocess.CompletedProcess[str]]:
    root = tmp_path_factory.mktemp("cli") / "ä b"
    done = command(
        "train.py",
        "adapter=qlora",
        "quant=nf4",
        "data=skills",
        "data.num_records=400",
        "metrics.exact_match.max_examples=8",
        "trainer.max_steps=12",
        "trainer.val_every_n_steps=6",
        "samples.prompts=2",
        "run_name=qlora-test",
        f"output_root='{root}'",
    )
    assert done.returncode == 0, done.stderr
    return RunDir(root / "sft" / "qlora-test"), done


def test_the_run_directory_is_complete(qlora: tuple[RunDir, Any]) -> None:
    run, _ = qlora
    for name in ("config", "info", "metrics", "samples", "summary", "data_report", "mask_preview", "report"):
        assert getattr(run, name).is_file(), name
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert (run.best / "adapter" / "adapter_model.safetensors").is_file()
    assert (run.checkpoints / "step-00000012" / "manifest.json").is_file()
    assert not run.lock.exists()
    summary = read_json(run.summary)
    assert summary["status"] == "finished"
    assert summary["exit_code"] == 0
    assert 4.1 < summary["model/base_bits_per_param"] < 4.6
    assert summary["model/params_trainable"] < summary["model/params_total"]
    info = read_json(run.info)
    assert {
        "git_commit",
        "versions",
        "hardware",
        "seed",
        "data_hash",
        "tokenizer_hash",
        "argv",
    } <= info.keys()


def test_every_metric_is_logged_and_the_loss_falls(qlora: tuple[RunDir, Any]) -> None:
    run, _ = qlora
    rows = lines(run.metrics)
    seen = {name for row in rows for name in row} - {"step", "time"}
    assert seen >= METRICS
    validations = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
    assert [step for step, _ in validations] == [0, 6, 12]
    assert validations[-1][1] < validations[0][1]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))


def test_samples_are_a_grid_of_prompts_samplers_and_steps(qlora: tuple[RunDir, Any]) -> None:
    run, _ = qlora
    rows = lines(run.samples)
    assert {(r["step"], r["prompt_id"], r["sampler"]) for r in rows} == {
        (step, prompt, sampler)
        for step in (0, 6, 12)
        for prompt in (0, 1)
        for sampler in ("greedy", "top_p_temperature")
    }
    assert len(rows) == 12
    assert all(set(SAMPLE_FIGURES) <= row.keys() for row in rows)
    assert [row["step"] for row in rows if row["similarity"] is None] == [0] * 4
    assert all(0 <= row["similarity"] <= 1 for row in rows if row["step"])


def test_wandb_has_the_same_numbers(qlora: tuple[RunDir, Any]) -> None:
    run, _ = qlora
    (file,) = run.path.glob("wandb/*offline-run-*/run-*.wandb")
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    records = [json.loads(line) for line in shown.splitlines()]
    keys: set[str] = set()
    history: dict[tuple[int, str], float] = {}
    for record in records:
        if record["type"] != "history":
            continue
        row = record["history"]["item"]
        keys |= row.keys()
        history.update(
            {(row["trainer/step"], name): value for name, value in row.items() if isinstance(value, float)}
        )
    assert keys >= METRICS
    for row in lines(run.metrics):
        for name, value in row.items():
            if name in ("train/loss", "val/loss"):
                assert history[(row["step"], name)] == value
    tables = sorted(
        run.path.glob("wandb/*offline-run-*/files/media/table/*.table.json"), key=lambda p: p.stat().st_mtime
    )
    table = max((json.loads(t.read_text(encoding="utf-8")) for t in tables), key=lambda t: len(t["data"]))
    assert table["columns"][:4] == ["step", "prompt_id", "prompt", "sampler"]
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == lines(run.samples)
    config = json.dumps([record for record in records if record["type"] in ("run", "config")])
    assert "qlora" in config
    assert "nf4" in config
    assert [record for record in records if record["type"] == "exit"]


def test_the_console_says_what_was_made(qlora: tuple[RunDir, subprocess.CompletedProcess[str]]) -> None:
    _, done = qlora
    for text in (
        "W&B: no key found",
        "wandb sync",
        "wandb leet",
        "val/loss",
        "samples at step 12",
        "report.html",
        "generate.py",
    ):
        assert text in done.stdout, text
    assert "Traceback" not in done.stderr


def test_what_was_printed_is_in_the_run_s_directory(
    qlora: tuple[RunDir, subprocess.CompletedProcess[str]],
) -> None:
    run, done = qlora
    first, *rest = (run.path / "console.log").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# 20")
    assert "adapter=qlora" in first
    on_stderr = done.stderr.splitlines()
    assert [line for line in rest if line not in on_stderr] == done.stdout.splitlines()
    assert not set(done.stdout) & {"\x1b", "\r"}


OUTSIDE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lmlab":
            raise ImportError("lmlab must not be needed")
sys.meta_path.insert(0, Block())
import json, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
kind, folder, base, ids, out = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), sys.argv[5]
if kind == "adapter":
    from peft import PeftModel
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    base_model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quant, dtype=torch.float32)
    for module in base_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' lossy repacking on CPUs with AVX512-BF16
    model = PeftModel.from_pretrained(base_model, folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model.eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0]
torch.save(logits, out)
"""


def outside_logits(kind: str, folder: Path, base: str, ids: list[int], tmp_path: Path) -> Any:
    """Logits from a process that cannot import lmlab."""
    import torch

    script, out = tmp_path / "outside.py", tmp_path / "logits.pt"
    script.write_text(OUTSIDE, encoding="utf-8")
    done = command(str(script), kind, str(folder), base, json.dumps(ids), str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parity
def test_against_peft_alone_logits(qlora: tuple[RunDir, Any], tmp_path: Path) -> None:
    import torch

    from lmlab.load import load_for_use

    run, _ = qlora
    base = read_json(run.path / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert Path(base).is_absolute()
    ids = list(range(5, 45))
    ours = load_for_use(str(run.path), accelerator="cpu").generator
    with torch.no_grad(), ours.around():
        logits = ours.model(input_ids=torch.tensor([ids])).logits[0]
    theirs = outside_logits("adapter", run.path / "adapter", base, ids, tmp_path)
    assert float((logits - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.slow
def test_generate_uses_the_run_with_its_template(qlora: tuple[RunDir, Any]) -> None:
    run, _ = qlora
    first = command(
        "scripts/generate.py", str(run.path), "--prompt", "Reverse the words.", "--max-new-tokens", "8"
    )
    again = command(
        "scripts/generate.py", str(run.path), "--prompt", "Reverse the words.", "--max-new-tokens", "8"
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("> Reverse the words.")


def test_a_changed_base_is_refused(qlora: tuple[RunDir, Any], tmp_path: Path) -> None:
    import shutil

    run, _ = qlora
    adapter = tmp_path / "adapter"
    shutil.copytree(run.path / "adapter", adapter)
    info = json.loads((adapter / "lmlab.json").read_text(encoding="utf-8"))
    info["base_fingerprint"]["tensors"] = "0" * 16
    (adapter / "lmlab.json").write_text(json.dumps(info), encoding="utf-8")
    done = command("scripts/generate.py", str(adapter), "--prompt", "x", "--sampler", "greedy")
    assert done.returncode == 2
    assert "trained on another base" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_no_file_carries_the_environment(qlora: tuple[RunDir, Any], tmp_path: Path) -> None:
    """A planted token reaches no file of a run (here a short one, with the token in the environment and in .env)."""
    token = "hf_" + "q7" * 12
    (tmp_path / ".env").write_text(f"HF_TOKEN={token}\n", encoding="utf-8")
    done = command(
        str(ROOT / "train.py"),
        "debug=fdr",
        "logger.mode=offline",
        "run_name=planted",
        f"output_root={tmp_path / 'out'}",
        cwd=tmp_path,
        MY_SECRET=token,
    )
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) > 15
    assert not [p for p in files if token.encode() in p.read_bytes()]
