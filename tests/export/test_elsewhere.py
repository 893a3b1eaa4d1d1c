"""Exports in the hands of other programs: transformers and PEFT without lmlab, llama.cpp, Ollama, W&B, the hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from lmlab.data.formats import ALPACA, BRIEF
from lmlab.export.certificate import NAME
from lmlab.export.job import ExportJob
from lmlab.export.serving import Step, as_markdown, gguf, modelfile, vllm
from lmlab.exporting import check_artifact, export, log_to_wandb, public_name
from lmlab.journal import read_json
from lmlab.records import UserError
from tests.export.conftest import MakeRun

QUIET: Any = lambda text: None  # noqa: E731

COMPARE = """
import json, sys
try:
    import lmlab
except ImportError:
    pass
else:
    raise SystemExit("lmlab is importable here")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base = sys.argv[1], sys.argv[2]
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert len(AutoTokenizer.from_pretrained(folder)) > 0
worst = 0.0
for entry in json.load(open(folder + "/certificate.json"))["reference"]:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([entry["input_ids"]])).logits[0]
    assert logits.argmax(-1).tolist() == entry["greedy_ids"]
    apart = (logits[-1, entry["top_ids"]] - torch.tensor(entry["top_logits"])).abs().max().item()
    worst = max(worst, apart / entry["largest_absolute_logit"])
print(json.dumps({"worst": worst, "modules": [m for m in sys.modules if m.startswith("lmlab")]}))
"""


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has this one's libraries, but not lmlab."""
    root = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    libraries = root / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lmlab" not in entry.name and entry.suffix != ".pth":  # an editable install is a .pth
            (libraries / entry.name).symlink_to(entry)
    python = root / "venv" / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "libraries.pth").write_text(f"{libraries}\n")
    return python


def as_stranger(python: Path, folder: Path, base: str, cwd: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(python), "-c", COMPARE, str(folder), base]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=environment, cwd=cwd, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_transformers_without_lmlab_computes_the_reference(
    stranger: Path, exported: Path, tmp_path: Path
) -> None:
    found = as_stranger(stranger, exported, "", tmp_path)
    assert found["modules"] == []
    assert found["worst"] < 1e-6  # the same libraries, another process


@pytest.mark.slow
def test_peft_without_lmlab_computes_the_reference(stranger: Path, runs: MakeRun, tmp_path: Path) -> None:
    run = runs("lora")
    export(
        ExportJob(str(run.path), adapter_only=True, base_name="somebody/tiny-base"),
        tmp_path / "out",
        say=QUIET,
    )
    base = read_json(run.path / "adapter" / "lmlab.json")["base"]
    found = as_stranger(stranger, tmp_path / "out", base, tmp_path)
    assert found["modules"] == []
    assert found["worst"] < 1e-5  # lmlab's fused LoRA sums in another order than PEFT
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "somebody/tiny-base"
    assert base not in "".join(p.read_text(errors="replace") for p in (tmp_path / "out").iterdir())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: somebody/tiny-base" in card
    assert "vllm serve somebody/tiny-base --enable-lora --max-lora-rank 8 --lora-modules out=DIR" in card


@pytest.mark.slow
def test_llama_cpp_converts_an_export(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs LLAMA_CPP (a checkout) and, for its packages, LLAMA_CPP_PYTHON; stories260k has a tokenizer it knows."""
    if not os.environ.get("LLAMA_CPP"):
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    import shutil

    folder = tmp_path / "stories"
    shutil.copytree(real_data / "stories260k-hf", folder)
    step = gguf(folder, name="stories", dtype="fp32")
    assert step.state == "done: stories-f32.gguf", step.state
    monkeypatch.syspath_prepend(str(Path(os.environ["LLAMA_CPP"]) / "gguf-py"))
    reader = pytest.importorskip("gguf", reason="the gguf package reads the file back").GGUFReader
    from safetensors.torch import load_file

    tensors = {tensor.name: tensor for tensor in reader(folder / "stories-f32.gguf").tensors}
    weights = load_file(folder / "model.safetensors")
    ours = weights["model.layers.0.mlp.down_proj.weight"].numpy()
    assert (tensors["blk.0.ffn_down.weight"].data == ours).all()


def test_a_failed_conversion_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys; open(sys.argv[3], 'w').write('half'); raise SystemExit('no such architecture')"
    )
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    folder = tmp_path / "export"
    folder.mkdir()
    assert gguf(folder, name="x", dtype="bf16").state == "failed: no such architecture"
    assert list(folder.iterdir()) == []
    script.write_text("print('done, it says')")
    assert gguf(folder, name="x", dtype="bf16").state.startswith("failed"), "exit code 0 without a GGUF file"


def test_without_a_tool_a_step_is_written_down_as_unverified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    step = gguf(tmp_path, name="x", dtype="fp16")
    assert "unverified" in step.state
    assert step.commands == ("python convert_hf_to_gguf.py DIR --outfile DIR/x-f16.gguf --outtype f16",)
    assert "unverified" in vllm(name="x", kind="merged", base=None, rank=None).state
    assert "**GGUF** (unverified" in as_markdown([step])
    assert Step("a", ("b", "c"), "d").line() == "a (d): b && c"


def test_a_modelfile_asks_as_in_training() -> None:
    info = {
        "format": "triples",
        "template": BRIEF,
        "sampler": {"kind": "top_p", "top_p": 0.9, "temperature": 0.7},
    }
    text = modelfile(source="./x.gguf", info=info, chat_template="{{ messages }}", stops=["<|endoftext|>"])
    assert text == (
        'FROM ./x.gguf\nTEMPLATE """### Instruction:\n{{ .Prompt }}\n### Response:\n"""\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0.7\nPARAMETER top_p 0.9\n'
    )
    strict = {
        "kind": "greedy",
        "stop": ["\n\n", "<|endoftext|>"],
        "repetition_penalty": 1.2,
        "max_new_tokens": 64,
    }
    text = modelfile(source=".", info={"sampler": strict}, chat_template=None, stops=["<|endoftext|>"])
    assert text.splitlines()[2:] == [
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "\\n\\n"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.2",
        "PARAMETER num_predict 64",
    ]
    alpaca = modelfile(source=".", info={"template": ALPACA}, chat_template=None, stops=[])
    assert (
        "appropriately completes the request.\n\n### Instruction:\n{{ .Prompt }}\n\n### Response:" in alpaca
    )
    own = modelfile(source=".", info={"format": "messages"}, chat_template="{{ unknown }}", stops=[])
    assert "TEMPLATE" not in own
    assert "translate chat_template.jinja" in own
    plain = modelfile(source=".", info={"sampler": {"kind": "greedy"}}, chat_template=None, stops=[])
    assert plain == 'FROM .\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER temperature 0\n'


def test_the_card_is_the_hubs_and_says_what_was_measured(exported: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 5.167294
    text = card.text
    certificate = json.loads((exported / NAME).read_text(encoding="utf-8"))
    assert f"{certificate['differences']['export_from_trained']['max_relative']:.1e}" in text
    for said in (
        "d78ff16770deb2c8",
        "nf4 with double quantization",
        "validation loss (nats per token) | 5.167",
        "559",
    ):
        assert said in text, said
    assert "No licence was given" in text
    assert not re.search(r"None|\{\{ (?!instruction|input)|More Information Needed", text)


def test_names_of_bases() -> None:
    from lmlab.models.build import ASSETS

    assert public_name(None) is None
    assert public_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert public_name("/data/models/llama") == "llama"
    assert public_name("/data/outputs/pretrain/my-run/model") == "my-run"
    assert public_name(str((ASSETS / "tiny-base").resolve())) == "tiny-base"


def test_an_artifact_of_an_untracked_run_is_refused_without_wandb(runs: MakeRun) -> None:
    code = (
        "import sys\nfrom lmlab.exporting import check_artifact\nfrom lmlab.export.job import ExportJob\n"
        "from lmlab.records import UserError\n"
        f"try:\n    check_artifact(ExportJob({str(runs('full').path)!r}))\n"
        "except UserError as error:\n    print(error)\nprint('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the run is not tracked by W&B" in done.stdout
    assert done.stdout.strip().endswith("False")


@pytest.mark.slow
def test_an_artifact_offline(
    runs: MakeRun, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    run = runs("qlora")
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    config["logger"] |= {"mode": "offline"}
    run.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    job = ExportJob(str(run.path))
    check_artifact(job)
    said: list[str] = []
    certificate = json.loads((exported / NAME).read_text(encoding="utf-8"))
    log_to_wandb(job, exported, "my-model", certificate, say=said.append)
    assert "artifact my-model with aliases latest, step-6, offline" in said[0]
    logged = list((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logged) == 1
    content = logged[0].read_bytes()
    assert b"my-model" in content
    assert b"step-6" in content
    with pytest.raises(UserError, match="the artifact was not logged"):
        log_to_wandb(job, exported, "not a name/", certificate, say=said.append)
