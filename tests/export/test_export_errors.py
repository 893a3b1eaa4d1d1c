"""What cannot be exported is said in one line, before anything is loaded or written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmlab.certify import _packages
from lmlab.export.certificate import BOUND, NAME, Difference, difference, file_hashes, verdict
from lmlab.export.directory import check_finite, check_portable, check_target, made_beside
from lmlab.export.job import ExportJob, parse_adapters
from lmlab.export.serving import find_converter
from lmlab.exporting import copy_name, export
from lmlab.records import UserError


def run_folder(path: Path, weights: str | None = "adapter") -> Path:
    path.mkdir()
    (path / "config.yaml").write_text("x: 1")
    (path / "run.json").write_text("{}")
    if weights:
        (path / weights).mkdir()
    return path


@pytest.mark.parametrize(
    ("weights", "changes", "said"),
    [
        ("adapter", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("adapter", {"base": "nf4"}, "not merged into a quantized base"),
        ("adapter", {"base": "quantized"}, "not merged into a quantized base"),
        ("adapter", {"base": "bigger"}, "unknown base 'bigger'"),
        (None, {}, "the run has no weights yet"),
        ("adapter", {"best": True}, "the run has no best weights yet"),
        ("model", {"adapter_only": True}, "the run trained all weights"),
        ("model", {"base": "original"}, "the run trained all weights"),
        ("adapter", {"adapter_only": True, "dtype": "bf16"}, "an adapter alone is exported as it was saved"),
    ],
)
def test_what_cannot_be_exported(
    tmp_path: Path, weights: str | None, changes: dict[str, Any], said: str
) -> None:
    run = run_folder(tmp_path / "run", weights)
    with pytest.raises(UserError, match=said):
        ExportJob(str(run), **changes).check()


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        ExportJob(str(tmp_path / "absent")).check()
    with pytest.raises(UserError, match="not a run's directory"):
        ExportJob(str(tmp_path)).check()


def test_a_target_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs")
    for inside in (run, run / "exports" / "x", run.parent):
        with pytest.raises(UserError, match="does not go into a run's directory or around it"):
            check_target(inside, run=run, overwrite=True)
    taken = tmp_path / "taken"
    taken.mkdir()
    check_target(taken, run=run, overwrite=False)
    (taken / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="the directory is not empty"):
        check_target(taken, run=run, overwrite=False)
    with pytest.raises(UserError, match="not an export"):
        check_target(taken, run=run, overwrite=True)
    with pytest.raises(UserError, match="not a directory"):
        check_target(taken / "a.txt", run=run, overwrite=True)


def test_only_what_an_export_wrote_is_overwritten(tmp_path: Path) -> None:
    to, run = tmp_path / "out", run_folder(tmp_path / "run")
    (to / "data").mkdir(parents=True)
    (to / NAME).write_text('{"name": "a diploma", "files": {}}')
    with pytest.raises(UserError, match=r"no certificate\.json of lmlab's there"):
        check_target(to, run=run, overwrite=True)
    (to / "config.json").write_text("{}")
    reference = {"input_ids": [1], "top_ids": [1], "top_logits": [0.5], "largest_absolute_logit": 1.0}
    certificate = {
        "format": 1,
        "kind": "model",
        "weights": "last",
        "dtype": "fp32",
        "base": None,
        "files": file_hashes(to),
        "reference": [reference],
    }
    (to / NAME).write_text(json.dumps(certificate))
    check_target(to, run=run, overwrite=True)
    for mine in ("data/thesis.md", ".git"):
        (to / mine).write_text("x")
        with pytest.raises(UserError, match=f"{mine} is not part of the export there"):
            check_target(to, run=run, overwrite=True)
        (to / mine).unlink()


def test_of_a_link_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "config.json").write_text("old")
    (tmp_path / "latest").symlink_to("v1")
    with made_beside(tmp_path / "latest") as made:
        (made / "config.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "v1"]
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "v1" / "config.json").read_text() == "new"


def test_exports_of_one_name_have_each_a_certificate_beside_the_run(tmp_path: Path) -> None:
    one, other = copy_name(tmp_path / "a" / "model"), copy_name(tmp_path / "b" / "model")
    assert one != other
    assert one.startswith("model-")
    assert copy_name(tmp_path / "b" / ".." / "a" / "model") == one


def test_a_wrong_converter_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    run = run_folder(tmp_path / "run")  # with weights that cannot be loaded
    with pytest.raises(UserError, match=r"no convert_hf_to_gguf\.py there"):
        export(ExportJob(str(run)), tmp_path / "out", want=frozenset({"gguf"}))


def test_an_interrupted_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    to = tmp_path / "out"

    def interrupted() -> None:
        with made_beside(to) as made:
            (made / "config.json").write_text("{}")
            assert not to.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    killed = tmp_path / ".out.99999999.tmp"  # a process that was killed could not clear up
    killed.mkdir()
    with made_beside(to) as made:
        (made / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_path_of_this_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": "/usr/bin/env"}')
    check_portable(tmp_path, {"/somewhere/else"})
    (tmp_path / "config.json").write_text('{"a": "/somewhere/else/x"}')
    with pytest.raises(UserError, match=r"config\.json names a path of this machine, /somewhere/else"):
        check_portable(tmp_path, {"/somewhere/else"})
    (tmp_path / "config.json").write_text(f'{{"a": "{tmp_path}"}}')
    with pytest.raises(UserError, match="names a path of this machine"):
        check_portable(tmp_path, set())


@pytest.mark.parametrize(
    ("text", "known", "found"),
    [
        ("python scripts/export.py --verify DIR", "/export", False),
        ("see /exports/x", "/export", False),
        ("see /export.py", "/export", False),
        ("https://export/x", "/export", False),
        ("my outputs/run", "outputs/run", False),  # names no machine
        ("to /export.", "/export", True),
        ('"/export/x"', "/export", True),
        ("--to=/export", "/export/", True),
        ("file:///export/x", "/export", True),
    ],
)
def test_a_path_is_found_whole(tmp_path: Path, text: str, known: str, found: bool) -> None:
    (tmp_path / "README.md").write_text(text)
    if found:
        with pytest.raises(UserError, match="names a path of this machine, /export"):
            check_portable(tmp_path, {known})
    else:
        check_portable(tmp_path, {known})


def test_the_card_tells_the_command_without_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from lmlab.export.card import _command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "a.jsonl").write_text("")
    kept = ["model.name=org/model", "data.columns=[a,b]", "optim.lr=1e-3", "data.url=https://host/x"]
    gone = [
        "data.path=[x,/data/a.jsonl]",
        "data.path=my/a.jsonl",
        "/etc/hosts",
        "model.name=~/m",
        'a=["my/a.jsonl"]',
    ]
    facts: Any = SimpleNamespace(info={"argv": [str(tmp_path / "train.py"), *kept, *gone]})
    assert _command(facts) == "python train.py " + " ".join(kept)
    assert _command(SimpleNamespace(info={"argv": ["train.py"]})) == "python train.py"  # type: ignore[arg-type]
    assert _command(SimpleNamespace(info={})) == ""  # type: ignore[arg-type]


def test_weights_beyond_fp16_are_refused() -> None:
    layer = torch.nn.Linear(1, 1)
    check_finite(layer)
    torch.nn.init.constant_(layer.weight, 1e5)
    with pytest.raises(UserError, match="weight is not finite in float16"):
        check_finite(layer.half())


@pytest.mark.parametrize("text", ["a", "a=DIR", "a=DIR:x", "=DIR:1", "a:1", "a=DIR:nan"])
def test_adapters_that_are_not_understood(text: str) -> None:
    with pytest.raises(UserError, match="is no adapter with a weight"):
        parse_adapters(text)


def test_adapters() -> None:
    assert parse_adapters("") == {}
    assert parse_adapters("a=x/y:0.5, b=C:/z:-1,default:2") == {
        "a": ("x/y", 0.5),
        "b": ("C:/z", -1.0),
        "default": ("", 2.0),
    }
    with pytest.raises(UserError, match="two adapters named 'a'"):
        parse_adapters("a=x:1,a=y:1")
    with pytest.raises(UserError, match="'default' is the run's own adapter"):
        parse_adapters("default=outputs/sft/other:0.5")


@pytest.mark.parametrize("kind", ["modules_to_save", "trainable_token_indices", "use_dora"])
def test_what_has_no_weighted_sum_takes_the_weight_1_only(kind: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmlab.certify import _mix

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    base = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
    extra: dict[str, Any] = {
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        "use_dora": {"use_dora": True},
    }[kind]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **extra))
    _mix(model, {"default": 1.0})
    with pytest.raises(UserError, match="which has no weighted sum"):
        _mix(model, {"default": 0.5})
    plain = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=16, **size)), LoraConfig(r=2))
    _mix(plain, {"default": 0.5})


def test_a_converter_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match=r"no convert_hf_to_gguf\.py there"):
        find_converter()
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_converter() is None


def test_the_script_says_it_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import runpy

    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "export.py"))["main"]
    run = run_folder(tmp_path / "run")
    for arguments in ([], [str(run)], [str(run), "--to", str(run / "x")], ["--verify", str(tmp_path)]):
        assert main(arguments) == 2
        found = capsys.readouterr()
        assert found.out == ""
        assert len(found.err.strip().splitlines()) == 1, found.err
        assert found.err.startswith("error: ")


# --- the comparison itself -------------------------------------------------------------------------------------------


def test_a_difference_is_measured_over_all_positions() -> None:
    reference = [torch.tensor([[0.0, 4.0, 1.0], [-8.0, 2.0, 1.0]])]
    other = [torch.tensor([[0.5, 4.0, 1.0], [-8.0, 2.0, 3.0]])]
    found = difference(reference, other, bound=1e-4)
    assert found == Difference(2.0, 0.25, 0.5, 0, 2)
    assert not found.within(0.3), "a greedy choice is another, and not at a tie"
    assert difference(reference, other, bound=0.1).ties == 1, "1 apart, twice 0.1 of 8 is 1.6"
    assert difference(reference, reference, bound=1e-4) == Difference(0.0, 0.0, 1.0, 0, 2)


def test_nan_is_within_no_bound() -> None:
    found = difference([torch.ones(1, 3)], [torch.full((1, 3), torch.nan)], bound=1e-4)
    assert not found.within(BOUND)


def test_a_verdict_names_its_figures() -> None:
    found = {"export_from_trained": Difference(1.0, 0.2, 0.75, 0, 4)}
    verdict(found, bound=1e-4, certified=[])
    with pytest.raises(UserError, match=r"export from trained differs by 2\.00e-01 .* agree at 75\.00%"):
        verdict(found, bound=1e-4, certified=found)


def test_the_comparing_process_does_not_look_among_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """There scripts/evaluate.py would stand for the package `evaluate`."""
    scripts = str(Path("scripts").resolve())
    monkeypatch.setattr(sys, "argv", [f"{scripts}/export.py"])
    monkeypatch.setattr(sys, "path", [scripts, "", *sys.path])
    assert _packages() == [place for place in sys.path[2:] if place]
