"""Files made to do harm: each is refused in one line, and nothing of what it asks for happens."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lmlab.config.compose import load_frozen
from lmlab.journal import RunDir
from lmlab.load import load_for_use
from lmlab.records import UserError
from lmlab.training.checkpoint import FolderCheckpointIO

from .conftest import TINY, command

Train = Callable[..., RunDir]
QUICK = (*TINY, "trainer.max_steps=1")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    """A folder that must not come to be."""
    return tmp_path / "harm"


@pytest.fixture(scope="session")
def trained(train: Train) -> RunDir:
    return train("victim", *QUICK, "adapter.rank=2")


@pytest.fixture
def adapter(trained: RunDir, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.path / "adapter", tmp_path / "adapter"))


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path, content: bytes) -> Path:
    """A checkpoint with a manifest that vouches for ``content``: whoever can write one can write the other."""
    path = folder / "step-00000001"
    path.mkdir(parents=True)
    (path / "state.pt").write_bytes(content)
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": {"state.pt": about}}))
    return path


def hostile_states(folder: Path, harm: Path) -> dict[str, bytes]:
    saved = folder / "saved.pt"
    torch.save({"global_step": 1, "callbacks": Payload(harm)}, saved)
    legacy = folder / "legacy.pt"
    torch.save({"global_step": 1, "loops": Payload(harm)}, legacy, _use_new_zipfile_serialization=False)
    bomb = folder / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
        archive.writestr("archive/version", "3")
    return {
        "a payload": saved.read_bytes(),
        "a payload in torch's old format": legacy.read_bytes(),
        "a bare pickle": pickle.dumps(Payload(harm)),
        "a zip bomb": bomb.read_bytes(),
        "an empty file": b"",
        "text": b"import os",
    }


def test_checkpoints(tmp_path: Path, harm: Path) -> None:
    for name, content in hostile_states(tmp_path, harm).items():
        path = checkpoint_of(tmp_path / name.replace(" ", "-"), content)
        line = refusal(lambda path=path: FolderCheckpointIO().load_checkpoint(path))
        assert "checkpoint" in line, name
        assert not harm.exists(), name


def test_lightning_s_own_hook_for_instantiating_is_data_to_us(tmp_path: Path) -> None:
    """CVE-2026-58659: `_instantiator` in hyperparameters. Nothing here builds a module from a checkpoint."""
    state = {
        "global_step": 1,
        "hyper_parameters": {"_instantiator": "os.mkdir", "path": str(tmp_path / "harm")},
    }
    FolderCheckpointIO().save_checkpoint(state, tmp_path / "step-00000001")
    loaded = FolderCheckpointIO().load_checkpoint(tmp_path / "step-00000001")
    assert loaded["hyper_parameters"]["_instantiator"] == "os.mkdir"
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_resuming_from_one_is_refused_as_typed(trained: RunDir, tmp_path: Path, harm: Path) -> None:
    saved = tmp_path / "saved.pt"
    torch.save({"global_step": 1, "callbacks": Payload(harm)}, saved)
    run = RunDir(tmp_path / "sft" / "copy")
    shutil.copytree(trained.path, run.path)
    shutil.rmtree(run.checkpoints)
    path = checkpoint_of(run.checkpoints, saved.read_bytes())
    for resume in ("auto", str(path)):
        done = command(
            "train.py", *TINY, "trainer.max_steps=2", "adapter.rank=2", "logger=none",
            f"output_root={tmp_path}", "run_name=copy", f"resume={resume}",
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert "holds code, which is not run" in done.stderr
        assert "Traceback" not in done.stderr
        assert not harm.exists()


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_the_adapter_itself_is_good(adapter: Path) -> None:
    assert load_for_use(str(adapter), accelerator="cpu").generator is not None


def test_an_adapter_in_a_pickle_file(adapter: Path, harm: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Payload(harm)}, adapter / "adapter_model.bin")
    assert "is not opened" in refusal(lambda: load_for_use(str(adapter), accelerator="cpu"))
    assert not harm.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "X"}},
            None,
        ),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "names code to import"),
        ({"peft_type": "NOTHING"}, "is of type"),
        ({"peft_type": ["LORA"]}, "is of type"),
        ({"target_modules": ["no_such_layer"]}, "cannot be loaded"),
        ({"r": "many"}, "cannot be loaded"),
        ({"r": 4}, "cannot be loaded"),
        ({"target_modules": ["q_proj"]}, "does not fit its base"),
        ({"modules_to_save": ["../../x"]}, None),
    ],
)
def test_an_adapter_config_that_asks_for_something_odd(
    adapter: Path, change: dict[str, Any], said: str | None
) -> None:
    import sys

    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if said is None:  # nothing is done about it
        load_for_use(str(adapter), accelerator="cpu")
    else:
        assert said in refusal(lambda: load_for_use(str(adapter), accelerator="cpu"))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("base", ["/etc", "../../../etc/passwd", "/dev/zero", "a/../../b", "nul\x00l", ""])
def test_an_adapter_with_an_odd_base(adapter: Path, base: str) -> None:
    for name, key in (("lmlab.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        file = adapter / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: base}))
    assert refusal(lambda: load_for_use(str(adapter), accelerator="cpu"))


def broken_safetensors(whole: bytes) -> dict[str, bytes]:
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def with_header(changed: Any) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    return {
        "header beyond the file": struct.pack("<Q", 1 << 40) + whole[8:],
        "header of no length": struct.pack("<Q", 0) + whole[8:],
        "header that is no JSON": with_header(b"{" * size),
        "header of deep lists": with_header(b"[" * 100_000 + b"]" * 100_000),
        "offsets beyond the file": with_header(
            {**header, first: {**header[first], "data_offsets": [0, 1 << 40]}}
        ),
        "negative offsets": with_header({**header, first: {**header[first], "data_offsets": [-8, 0]}}),
        "a shape too large": with_header({**header, first: {**header[first], "shape": [1 << 40, 1 << 40]}}),
        "an unknown type": with_header({**header, first: {**header[first], "dtype": "X9"}}),
        "cut": whole[: len(whole) // 2],
        "a pickle": pickle.dumps({"x": 1}),
        "empty": b"",
    }


def test_safetensors_with_broken_headers(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    for name, content in broken_safetensors(file.read_bytes()).items():
        file.write_bytes(content)
        line = refusal(lambda: load_for_use(str(adapter), accelerator="cpu"))
        assert "cannot be loaded" in line, name


# --- configs and data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{harm}]",
        "task: !!python/object/new:os.mkdir [{harm}]",
        "_target_: os.mkdir\npath: {harm}",
        "model: {{_target_: os.mkdir, path: {harm}}}",
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b]",
    ],
)
def test_a_config_that_names_code(tmp_path: Path, harm: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text.format(harm=harm))
    refusal(lambda: load_frozen(file))
    assert not harm.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["+model._target_=os.mkdir", "+optim._target_=os.system", "++adapter={_target_: os.mkdir, kind: lora}", "run_name=../out",
     "run_name=/tmp/x", "run_name=a/b", "run_name=.hidden", "plugins=[../x]", "plugins=[os.path;x]"],
)  # fmt: skip
def test_an_override_that_names_code_or_leaves_its_place(tmp_path: Path, override: str) -> None:
    done = command("train.py", *QUICK, override, f"output_root={tmp_path / 'out'}")
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gz_that_unpacks_to_far_more(tmp_path: Path) -> None:
    """200 MB of one line of blanks in 200 KB: read as a stream, one record that is none, and no 200 MB more in memory."""
    import yaml as yaml_

    from lmlab.config.compose import CONF
    from lmlab.data.intake import Intake
    from lmlab.data.sources import JsonlData

    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=9) as stream:
        for _ in range(200):
            stream.write(b"\n" * (1 << 20))
        stream.write(json.dumps({"instruction": "Say it.", "output": "It."}).encode())
    common = yaml_.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["data"]
    config = JsonlData(**common | {"kind": "jsonl", "path": str(file)})
    assert len(list(config.records(Intake("error"), task="sft"))) == 1


def test_yaml_of_the_project_is_data_only() -> None:
    from lmlab.config.compose import CONF

    for file in CONF.rglob("*.yaml"):
        assert "_target_" not in file.read_text(encoding="utf-8")
        yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("how", ["dora", "rank pattern", "no task type"])
def test_good_adapters_of_peft_s_own_are_not_refused(tmp_path: Path, how: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmlab.config.compose import CONF

    tiny = CONF.parent / "assets" / "tiny-base"
    told: dict[str, Any] = {
        "dora": {"use_dora": True, "task_type": "CAUSAL_LM"},
        "rank pattern": {"rank_pattern": {"q_proj": 2}, "task_type": "CAUSAL_LM"},
        "no task type": {},
    }[how]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **told)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "adapter")
    assert load_for_use(str(tmp_path / "adapter"), accelerator="cpu").generator is not None
