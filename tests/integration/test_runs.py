"""Whole runs in this process: pretraining, every adapter x quant pair, resume, early stopping, scratch adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmlab.journal import RunDir, read_json
from lmlab.records import RefusedError, UserError
from tests.integration.conftest import QUICK, SMALL, lines
from tests.integration.test_command_line import outside_logits

Train = Callable[..., RunDir]
TEXT = "The quick brown fox jumps over the lazy dog, again and again; and {i} is a number. "


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus ü.txt"
    file.write_text(
        "".join(TEXT.format(i=i) + ("\n" if i % 5 == 0 else "") for i in range(800)), encoding="utf-8"
    )
    return file


@pytest.fixture(scope="session")
def pretrained(train: Train, corpus: Path) -> RunDir:
    return train(
        "pre",
        "task=pretrain",
        "data=text",
        f"data.path='{corpus}'",
        "data.max_length=64",
        "tokenizer.vocab_size=400",
        "trainer.max_steps=25",
        "trainer.val_every_n_steps=10",
        "samples.prompts=2",
        "optim.lr=3e-3",
        "optim.warmup_steps=2",
    )


def test_pretraining_lowers_the_loss_and_reports_bits_per_byte(pretrained: RunDir, corpus: Path) -> None:
    rows = [row for row in lines(pretrained.metrics) if "val/loss" in row]
    assert [row["step"] for row in rows] == [0, 10, 20, 25]
    assert rows[-1]["val/loss"] < 0.6 * rows[0]["val/loss"]
    report = read_json(pretrained.data_report)
    text = corpus.read_text(encoding="utf-8")
    assert report["train"]["supervised_bytes"] + report["val"]["supervised_bytes"] == len(
        text.encode("utf-8")
    )


@pytest.mark.slow
@pytest.mark.parity
def test_against_transformers_alone_validation_bits_per_byte(
    pretrained: RunDir, corpus: Path, tmp_path: Path
) -> None:
    """The saved model, in a process without lmlab, gives the logged bits per byte on the last 5 % of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained.path / "model")
    text = corpus.read_text(encoding="utf-8")
    val = text[len(text) - round(len(text) * 0.05) :]
    eos = tokenizer.eos_token_id
    ids = [eos, *tokenizer(val)["input_ids"], eos]
    nll, width = 0.0, 64
    windows = [ids[i : i + width + 1] for i in range(0, len(ids) - 1, width)]
    for window in windows[:3] + windows[-1:]:
        logits = outside_logits("model", pretrained.path / "model", "", window[:-1], tmp_path)
        nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
    ours = _window_nll(pretrained, [*range(3), len(windows) - 1])
    assert nll == pytest.approx(ours, rel=1e-5)
    last = [row for row in lines(pretrained.metrics) if "val/bits_per_byte" in row][-1]
    tokens = len(ids) - 1
    assert last["val/bits_per_byte"] == pytest.approx(
        last["val/loss"] * tokens / math.log(2) / len(val.encode("utf-8")), rel=1e-6
    )


def _window_nll(run: RunDir, indices: list[int]) -> float:
    from transformers import AutoModelForCausalLM

    from lmlab.data.prepare import PreparedData

    rows = PreparedData.load(Path(read_json(run.info)["prepared"])).rows("val")
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    total = 0.0
    with torch.no_grad():
        for index in indices:
            example = rows[index]
            logits = model(input_ids=example.input_ids[None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, example.labels, reduction="sum"))
    return total


def test_ones_own_model_is_a_base(train: Train, pretrained: RunDir, corpus: Path) -> None:
    run = train(
        "own-lora",
        "data=text",
        f"data.path='{corpus}'",
        "data.max_length=64",
        "model=pretrained",
        f"model.name_or_path={pretrained.path}",
        *SMALL,
    )
    base = read_json(run.path / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert base == str(pretrained.path / "model")
    rows = [row for row in lines(run.metrics) if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]


PAIRS = [
    (a, q) for a in ("none", "lora", "qlora") for q in ("none", "fp16", "bf16", "int8", "int4", "nf4", "fp4")
]
TRAINS = {("none", "none"), *(("lora", q) for _, q in PAIRS), ("qlora", "nf4"), ("qlora", "fp4")}


@pytest.mark.parametrize(("adapter", "quant"), PAIRS)
def test_every_pair_trains_or_is_refused(train: Train, adapter: str, quant: str) -> None:
    told = (
        f"adapter={adapter}",
        f"quant={quant}",
        "data=skills",
        "data.num_records=100",
        "metrics=none",
        "trainer.max_steps=3",
        "trainer.val_every_n_steps=3",
        "optim.warmup_steps=0",
        "samples.prompts=0",
    )
    if (adapter, quant) not in TRAINS:
        with pytest.raises(RefusedError, match=r"use (adapter|quant)="):
            train(f"pair-{adapter}-{quant}", *told)
        return
    run = train(f"pair-{adapter}-{quant}", *told)
    rows = [row for row in lines(run.metrics) if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    bits = read_json(run.summary)["model/base_bits_per_param"]
    low, high = {
        "none": (32, 32),
        "fp16": (16, 16),
        "bf16": (16, 16),
        "int8": (8, 8.2),
        "int4": (4.5, 4.5),
        "nf4": (4.127, 4.7),
        "fp4": (4.127, 4.7),
    }[quant]
    assert low <= bits <= high


def test_a_scratch_base_is_kept_beside_its_adapter(train: Train, corpus: Path) -> None:
    run = train(
        "scratch-lora",
        "task=pretrain",
        "adapter=lora",
        "data=text",
        f"data.path='{corpus}'",
        "data.max_length=64",
        "tokenizer.vocab_size=400",
        *SMALL,
    )
    assert (run.base / "model.safetensors").is_file()
    assert read_json(run.path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(run.base)
    checkpoint = torch.load(next(run.checkpoints.glob("step-*")) / "state.pt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])


@pytest.mark.parametrize(
    "adapter", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "lora")), "qlora"]
)
def test_resumed_equals_uninterrupted(train: Train, adapter: str) -> None:
    told = [
        f"adapter={adapter}",
        "data=skills",
        "data.num_records=60",
        "metrics=none",
        "trainer.val_every_n_steps=3",
        "trainer.batch_size=2",
        "trainer.accumulate_grad_batches=2",
        "samples.prompts=0",
        "checkpoint.keep=5",
        "optim.schedule=constant",
    ]
    if adapter == "lora":
        told.append("adapter.dropout=0.1")
    whole = train(f"whole-{adapter}", *told, "trainer.max_steps=6")
    train(f"parts-{adapter}", *told, "trainer.max_steps=4")
    parts = train(f"parts-{adapter}", *told, "trainer.max_steps=6", "resume=auto")

    def losses(run: RunDir) -> list[tuple[int, float]]:
        return [(row["step"], row["train/loss"]) for row in lines(run.metrics) if "train/loss" in row]

    assert losses(whole) == losses(parts)
    a, b = (
        torch.load(run.checkpoints / "step-00000006" / "state.pt", weights_only=True)
        for run in (whole, parts)
    )
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])


@pytest.mark.slow
def test_sampling_leaves_training_untouched(train: Train) -> None:
    told = (
        "data=skills",
        "data.num_records=100",
        "metrics=none",
        "adapter.dropout=0.2",
        "trainer.max_steps=5",
        "trainer.val_every_n_steps=2",
    )
    on = train("sampling-on", *told, "samples.prompts=3", "samples.every_n_steps=1")
    off = train("sampling-off", *told, "samples.prompts=0")
    assert [r["train/loss"] for r in lines(on.metrics) if "train/loss" in r] == [
        r["train/loss"] for r in lines(off.metrics) if "train/loss" in r
    ]


def test_early_stopping_ends_the_run_and_keeps_the_best(train: Train) -> None:
    run = train(
        "early",
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        "callbacks.early_stopping.min_delta=100.0",
        "data=skills",
        "data.num_records=100",
        "metrics=none",
        "trainer.max_steps=50",
        "trainer.val_every_n_steps=2",
        "samples.prompts=0",
    )
    assert read_json(run.summary)["steps"] == 4
    assert (run.best / "adapter").is_dir()
    assert (run.path / "adapter").is_dir()


def test_one_replica_is_no_rank_of_several(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters say so to every process: RANK=0 of WORLD_SIZE=1."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    run = train("one-replica", *QUICK[:-1])
    assert read_json(run.summary)["status"] == "finished"
    assert [row["step"] for row in lines(run.metrics) if "train/loss" in row] == [1, 2, 3]


def test_gradient_checkpointing_changes_no_number(train: Train) -> None:
    told = (
        "data=skills",
        "data.num_records=100",
        "metrics=none",
        "trainer.max_steps=3",
        "trainer.val_every_n_steps=3",
        "samples.prompts=0",
    )
    plain = train("plain", *told)
    checkpointed = train("checkpointed", *told, "model.gradient_checkpointing=true")
    a, b = (
        [r["train/loss"] for r in lines(run.metrics) if "train/loss" in r] for run in (plain, checkpointed)
    )
    assert a == pytest.approx(b, rel=1e-5)


def test_packing_trains_on_the_same_tokens(train: Train) -> None:
    told = (
        "data=skills",
        "data.num_records=100",
        "metrics=none",
        "trainer.max_steps=2",
        "trainer.val_every_n_steps=2",
        "samples.prompts=0",
    )
    run = train("packed", *told, "data.packing=true", "trainer.batch_size=2")
    rows = [row for row in lines(run.metrics) if "train/tokens" in row]
    assert rows[0]["train/tokens"] > 150  # two rows of up to 128 tokens, well filled


def test_what_is_wrong_is_said_before_anything_is_made(train: Train, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output"\n', encoding="utf-8"
    )
    no_output = tmp_path / "no_output.jsonl"
    no_output.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n', encoding="utf-8")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("schön".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "nomodel").mkdir()
    cases = {
        "missing": (("data=text", f"data.path={tmp_path}/nope.txt"), r"no such data file"),
        "empty": (
            ("data=text", f"data.path={tmp_path}/empty.txt"),
            r"no text: the file is empty \(.*empty\.txt\)",
        ),
        "json": (("data=jsonl", f"data.path={broken}"), r"broken JSON: .*\(.*broken\.jsonl:2\)"),
        "output": (("data=jsonl", f"data.path={no_output}"), r"no output: .*\(.*no_output\.jsonl:2\)"),
        "utf8": (("data=text", f"data.path={latin}"), r"not UTF-8: .*byte 3\)"),
        "model": (("model=pretrained", f"model.name_or_path={tmp_path}/nomodel"), r"no config\.json"),
        "context": (("data.max_length=4096",), r"beyond the model's context of 512"),
        "traversal": (("run_name=../x",), r"is not a run name"),
    }
    for name, (told, expected) in cases.items():
        out = tmp_path / "out" / name
        with pytest.raises(UserError, match=expected):
            train(f"bad-{name}", *told, f"output_root={out}")
        assert not out.exists(), name
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be"):
        train("bad-root", f"output_root={blocked}")


def test_an_existing_run_directory_is_refused(train: Train, pretrained: RunDir) -> None:
    before = sorted(p.name for p in pretrained.path.iterdir())
    with pytest.raises(UserError, match="already exists"):
        train("pre", "task=pretrain")
    assert sorted(p.name for p in pretrained.path.iterdir()) == before


def test_a_vocabulary_that_does_not_fit_is_refused(train: Train, pretrained: RunDir, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained.path / "model")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(5000)])
    tokenizer.save_pretrained(tmp_path / "big")
    with pytest.raises(UserError, match="embedding rows"):
        train("bad-vocab", "tokenizer=file", f"tokenizer.path={tmp_path / 'big'}")


def test_real_hub_layout_against_reference(train: Train, real_data: Path) -> None:
    """stories260k-hf by `model=pretrained`: a LoRA on tinyshakespeare lowers its validation loss from step 0."""
    run = train(
        "stories-lora",
        "task=pretrain",
        "adapter=lora",
        "data=text",
        f"data.path={real_data}/clm/tinyshakespeare.txt",
        "data.val_fraction=0.01",
        "model=pretrained",
        f"model.name_or_path={real_data}/stories260k-hf",
        "trainer.max_steps=10",
        "trainer.val_every_n_steps=10",
        "optim.warmup_steps=2",
        "samples.prompts=1",
    )
    rows = [row for row in lines(run.metrics) if "val/loss" in row]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert json.loads(run.samples.read_text(encoding="utf-8").splitlines()[0])["text"]


def test_resume_under_another_configuration_is_refused_with_a_diff(train: Train) -> None:
    told = [
        "data=skills",
        "data.num_records=60",
        "metrics=none",
        "samples.prompts=0",
        "trainer.val_every_n_steps=2",
    ]
    run = train("changed", *told, "trainer.max_steps=2")
    before = run.config.read_text(encoding="utf-8")
    for change, expected in (
        ("optim.lr=0.5", r"optim\.lr was 0\.001, now 0\.5"),
        ("adapter.rank=4", r"adapter\.rank was 16, now 4"),
        ("data.num_records=70", r"data\.num_records was 60, now 70"),
        ("trainer.batch_size=4", r"global batch was 8 rows, now 4"),
    ):
        with pytest.raises(UserError, match=expected):
            train("changed", *told, "trainer.max_steps=4", "resume=auto", change)
    assert run.config.read_text(encoding="utf-8") == before
    train(
        "changed",
        *told,
        "trainer.max_steps=4",
        "resume=auto",
        "trainer.batch_size=4",
        "trainer.accumulate_grad_batches=2",
    )
    assert read_json(run.summary)["steps"] == 4


@pytest.mark.slow
def test_resuming_loses_no_number_and_writes_none_twice(train: Train) -> None:
    told = [
        "data=skills",
        "data.num_records=60",
        "metrics=none",
        "samples.prompts=1",
        "trainer.val_every_n_steps=100",
    ]
    told += ["trainer.log_every_n_steps=3", "optim.schedule=constant", "checkpoint.keep=3"]
    whole = train("numbers-whole", *told, "trainer.max_steps=8")
    train("numbers-parts", *told, "trainer.max_steps=4")
    parts = train("numbers-parts", *told, "trainer.max_steps=8", "resume=auto")
    again = train("numbers-parts", *told, "trainer.max_steps=8", "resume=auto")

    def logged(run: RunDir) -> list[tuple[int, float, float]]:
        return [
            (r["step"], r["train/tokens"], r["train/loss"])
            for r in lines(run.metrics)
            if "train/loss" in r and r["step"] != 4
        ]

    assert [(step, tokens) for step, tokens, _ in logged(whole)] == [
        (step, tokens) for step, tokens, _ in logged(parts)
    ]
    summary = read_json(again.summary)
    assert summary["status"] == "finished"
    assert summary["final/train/loss"] == logged(whole)[-1][2]
    assert summary["final/val/loss"] == read_json(whole.summary)["final/val/loss"]


def test_optim_name_alone_chooses_the_optimizer(train: Train) -> None:
    run = train("by-name", "optim.name=sgd", "data=skills", "data.num_records=60", "metrics=none", *SMALL)
    assert "momentum" in run.config.read_text(encoding="utf-8")


def test_a_damaged_checkpoint_is_passed_over_and_said(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["data=skills", "data.num_records=60", "metrics=none", "samples.prompts=0", "checkpoint.keep=3"]
    told += ["trainer.val_every_n_steps=100", "checkpoint.every_n_steps=2", "optim.schedule=constant"]
    run = train("damaged", *told, "trainer.max_steps=4")
    with (run.checkpoints / "step-00000004" / "state.pt").open("r+b") as stream:
        stream.write(b"x")
    capsys.readouterr()
    train("damaged", *told, "trainer.max_steps=5", "resume=auto")
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said
    assert [row["step"] for row in lines(run.metrics) if "train/loss" in row] == [1, 2, 3, 4, 5]


def test_planned_memory_stands_beside_the_measured(train: Callable[..., RunDir]) -> None:
    run = train(
        "planned", "trainer.memory_plan=true", "data=skills", "data.num_records=60", "metrics=none", *SMALL
    )
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    for phase in ("load", "forward", "backward", "optimizer", "eval"):
        beside = [r for r in rows if f"memory/{phase}/planned_gb" in r]
        assert beside, phase
        assert all(f"memory/{phase}/peak_gb" in r for r in beside)
    summary = read_json(run.summary)
    assert abs(summary["memory/backward/plan_error"]) < 1.0, "not even of the right size"
    measured = [value for row in rows for name, value in row.items() if name.endswith("/peak_gb")]
    assert summary["memory/peak_gb"] == max(measured), "a plan is no peak"
    assert 0.0 < summary["memory/base_gb"] < summary["memory/peak_gb"]
