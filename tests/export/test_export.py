"""Exports as a stranger gets them: certified, portable, refused when touched, opened without lmlab."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmlab.certify import certify, verify, verify_against_run
from lmlab.export.certificate import BOUND, NAME, check_files, check_reference, file_hashes
from lmlab.export.job import ExportJob
from lmlab.exporting import copy_name, export
from lmlab.journal import RunDir, read_json
from lmlab.records import UserError
from tests.export.conftest import MakeRun

ROOT = Path(__file__).resolve().parents[2]
QUIET: Any = lambda text: None  # noqa: E731


def certificate_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NAME).read_text(encoding="utf-8"))


def test_a_qlora_run_is_merged_into_its_dequantized_base_and_certified(exported: Path, runs: MakeRun) -> None:
    found = certificate_of(exported)
    assert found["verdict"] == "certified"
    assert found["base"] == "dequantized"
    assert found["base_stored_as"] == {"kind": "nf4", "double_quant": True}
    for name in ("merged_from_trained", "export_from_merged", "export_from_trained"):
        assert found["differences"][name]["max_relative"] < 1e-5, name  # measured: 1e-6, the bound is 1e-4
        assert found["differences"][name]["greedy_agreement"] == 1.0
    assert found["differences"]["export_from_merged"]["max_absolute"] == 0.0
    assert found["texts"] == 3
    assert read_json(runs("qlora").path / "exports" / copy_name(exported)) == found
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    expected |= {"model.safetensors", "chat_template.jinja", "lmlab.json", "Modelfile", NAME}
    assert {path.name for path in exported.iterdir()} == expected
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())


def test_it_names_nothing_of_this_machine(exported: Path, runs: MakeRun) -> None:
    for path in exported.iterdir():
        content = path.read_bytes()
        for place in (runs("qlora").path.parent, exported.parent, ROOT, Path.home() / "x", Path("/tmp/")):
            assert str(place).encode() not in content, f"{place} in {path.name}"


def test_it_stops_and_asks_as_in_training(exported: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(exported)
    generation = GenerationConfig.from_pretrained(exported)
    assert generation.eos_token_id == [tokenizer.eos_token_id]
    assert generation.pad_token_id == tokenizer.pad_token_id is not None
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name it."}], tokenize=False, add_generation_prompt=True
    )
    assert written == "### Instruction:\nName it.\n### Response:\n"


def test_verify_accepts_it(exported: Path) -> None:
    certificate, worst = verify(exported)
    assert certificate == certificate_of(exported)
    assert worst is not None
    assert worst < 1e-6


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_tampered_export_is_refused_by_the_name_of_the_file(
    exported: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    flip_a_bit(copy / name)
    with pytest.raises(UserError, match=f"{re.escape(name)} is not what was certified"):
        verify(copy)


def test_a_missing_and_a_foreign_file_are_refused(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / ".git").mkdir()  # what a clone brings is no part of it
    (copy / ".git" / "HEAD").write_text("x")
    check_files(copy)
    (copy / "modeling_x.py").write_text("")
    with pytest.raises(UserError, match=r"modeling_x\.py is not part of what was certified"):
        verify(copy)
    (copy / "modeling_x.py").unlink()
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"chat_template\.jinja is missing"):
        verify(copy)
    with pytest.raises(UserError, match=r"no certificate\.json of lmlab's there"):
        verify(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        verify(tmp_path / "absent")


def test_an_export_that_brings_code_is_refused_before_it_runs(exported: Path, tmp_path: Path) -> None:
    """Even with a certificate to match, and where somebody would answer transformers' question with yes."""
    copy, ran = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(exported, copy)
    code = (
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    )
    (copy / "modeling_x.py").write_text(code)
    config = json.loads((copy / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    certificate = certificate_of(copy) | {"files": file_hashes(copy)}
    (copy / NAME).write_text(json.dumps(certificate))
    with pytest.raises(UserError, match="names code to run"):
        verify(copy)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": None}, "kind: "),
        ({"dtype": "int8"}, "dtype: "),
        ({"reference": []}, "reference: .*at least 1 item"),
        ({"reference": [{"input_ids": [1], "top_ids": [1], "top_logits": [1]}]}, "reference.0.largest_abs"),
        ({"files": {"config.json": {}}}, "files.config.json.bytes: "),
    ],
)
def test_a_damaged_certificate_is_said_in_one_line(
    exported: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (tmp_path / NAME).write_text(json.dumps(certificate_of(exported) | change))
    with pytest.raises(UserError, match=rf"certificate\.json is damaged: {said}"):
        verify(tmp_path)


def test_a_reference_with_tokens_of_another_model_is_refused(exported: Path) -> None:
    certificate = certificate_of(exported)
    certificate["reference"][0]["top_ids"][0] = 10**6
    with pytest.raises(UserError, match="names tokens that the model does not have"):
        check_reference(exported, certificate)


def test_weights_that_match_a_rewritten_certificate_still_have_to_compute_it(
    exported: Path, tmp_path: Path
) -> None:
    """Hashes alone would accept other weights with a certificate to match; the logits in it do not."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its logits are not those certified"):
        check_reference(copy, certificate_of(copy))


def test_a_wrong_merge_is_refused(exported: Path, runs: MakeRun, tmp_path: Path) -> None:
    """The comparison itself: against a run whose adapter is another one than that in the export."""
    run = tmp_path / "run"
    shutil.copytree(runs("qlora").path, run)
    shutil.copyfile(
        runs("qlora").path / "adapter" / "adapter_model.safetensors",
        run / "adapter" / "adapter_model.safetensors",
    )
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    weights = {name: tensor * (1.01 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not certified: export from merged differs by"):
        certify(ExportJob(str(run)), exported)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [None, "a layer lost", "scale x 0.99"])
def test_a_broken_export_in_16_bits_is_refused(
    runs: MakeRun, tmp_path: Path, dtype: str, fault: str | None
) -> None:
    """The rounding itself moves the logits farther than these faults do, so it must not hide them."""
    from peft.tuners.lora import LoraLayer

    from lmlab.certify import load_as_trained
    from lmlab.models.merge import merged

    job = ExportJob(str(runs("lora").path), dtype=dtype)
    model = load_as_trained(job).model
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and fault and (fault != "a layer lost" or "layers.0." in name):
            layer.scaling["default"] *= 0 if fault == "a layer lost" else 0.99
    stored = torch.bfloat16 if dtype == "bf16" else torch.float16
    merged(model, dtype=stored).save_pretrained(tmp_path)
    if fault is None:
        assert certify(job, tmp_path)["differences"]["export_from_merged"]["max_absolute"] == 0
    else:
        with pytest.raises(UserError, match="not certified: export from merged differs by"):
            certify(job, tmp_path)


def test_an_export_that_fails_leaves_nothing(
    runs: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("lmlab.exporting.write_model", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(ExportJob(str(runs("lora").path)), tmp_path / "out", say=QUIET)
    assert list(tmp_path.iterdir()) == []


# --- everything else takes a fresh process each ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_kind_of_run_in_every_dtype(runs: MakeRun, tmp_path: Path, kind: str, dtype: str) -> None:
    to = tmp_path / "out"
    export(ExportJob(str(runs(kind).path), dtype=dtype), to, say=QUIET)
    found = certificate_of(to)
    assert found["verdict"] == "certified"
    assert found["bound"] == BOUND
    assert found["differences"]["export_from_merged"]["max_absolute"] == 0, "bit for bit the rounded merge"
    apart = found["differences"]["export_from_trained"]["max_relative"]
    assert (apart > 1e-5) == (dtype != "fp32"), "a rounded export cannot be nearer, an exact one not farther"
    assert (
        json.loads((to / "config.json").read_text())["dtype"]
        == {
            "fp32": "float32",
            "bf16": "bfloat16",
            "fp16": "float16",
        }[dtype]
    )
    verify(to)


@pytest.mark.slow
def test_the_original_base_is_reported_and_not_certified(
    runs: MakeRun, exported: Path, tmp_path: Path
) -> None:
    to = tmp_path / "out"
    export(ExportJob(str(runs("qlora").path), base="original"), to, say=QUIET)
    found = certificate_of(to)
    assert found["verdict"] == "reported"
    assert found["differences"]["export_from_trained"]["max_relative"] > 1e-2
    assert found["differences"]["export_from_merged"]["max_absolute"] == 0
    assert "**Not certified.**" in (to / "README.md").read_text(encoding="utf-8")
    verify(to)


@pytest.mark.slow
def test_several_adapters_by_weight(runs: MakeRun, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    other = str(runs("other").path)
    job = ExportJob(str(runs("lora").path), adapters={"default": ("", 0.5), "b": (other, 2.0)})
    export(job, tmp_path / "mixed", say=QUIET)
    assert certificate_of(tmp_path / "mixed")["adapters"] == {"default": 0.5, "b": 2.0}
    export(ExportJob(str(runs("lora").path)), tmp_path / "one", say=QUIET)
    export(ExportJob(other), tmp_path / "two", say=QUIET)
    base = load_file(ROOT / "assets" / "tiny-base" / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    mixed, one, two = (
        load_file(tmp_path / each / "model.safetensors")[name] for each in ("mixed", "one", "two")
    )
    expected = base[name] + 0.5 * (one - base[name]) + 2.0 * (two - base[name])
    assert torch.allclose(mixed, expected, rtol=0, atol=1e-6)
    again = verify_against_run(job, tmp_path / "mixed")
    assert again["verdict"] == "certified"


@pytest.mark.slow
def test_trained_runs_through_the_command_line(train: Any, tmp_path: Path) -> None:
    """A real qlora and a real lora run, exported and checked as a user would."""
    few = ("trainer.max_steps=3", "samples.prompts=1", "samples.grid=[greedy]", "data.max_length=96")
    for adapter in ("lora", "qlora"):
        run: RunDir = train(f"export-{adapter}", f"adapter={adapter}", *few)
        to = tmp_path / adapter
        script = str(ROOT / "scripts" / "export.py")
        done = subprocess.run(
            [sys.executable, script, str(run.path), "--to", str(to), "--best", "--vllm"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "certified: within 1.0e-04" in done.stdout
        assert f"vllm serve {to}" in done.stdout
        assert (run.path / "exports" / copy_name(to)).is_file()
        assert read_json(to / "lmlab.json")["weights"] == "best"
        done = subprocess.run(
            [sys.executable, script, "--verify", str(to)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, "logits are those certified" in done.stdout) == (0, True), done.stderr
        flip_a_bit(to / "model.safetensors")
        done = subprocess.run(
            [sys.executable, script, "--verify", str(to)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: model.safetensors is not what was certified (")
        assert len(done.stderr.strip().splitlines()) == 1
