"""scripts/evaluate.py on real runs: a run's own validation comes out again, forms side by side, one line for each error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts.evaluate import _write, main

from lmlab.evaluation.table import markdown, tables, with_differences
from lmlab.journal import RunDir
from lmlab.models.build import ASSETS
from tests.evaluation.conftest import STEPS
from tests.integration.conftest import ROOT

BASE = str(ASSETS / "tiny-base")
RELATIVE = 1e-5  # fp32 sums, packed in training and padded here
Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """``evaluate(*arguments)``: the rows of --json."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        capsys.readouterr()  # what a training in the same test has printed
        code = main([*arguments, "--accelerator", "cpu", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def last(run: RunDir) -> dict[str, float]:
    """The last validation's figures."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {k.removeprefix("val/"): v for line in lines for k, v in line.items() if k.startswith("val/")}


def check(found: dict[str, Any], run: RunDir) -> None:
    logged = last(run)
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(logged[name], rel=RELATIVE), name


def test_a_runs_own_validation_comes_out_again(adapted: RunDir, evaluate: Evaluate) -> None:
    """By its prepared data, and by the data set's name read anew; exact match and ROUGE too."""
    named = ["skills", "--set", "data.num_records=120", "--set", "data.val_fraction=0.2"]
    for data in (["val"], named):
        [row] = evaluate(str(adapted.path), "--data", *data, "--answers", "8", "--max-new-tokens", "8")
        found = row["data"][data[0]]
        check(found, adapted)
        logged = last(adapted)
        assert found["answers"] == 8
        for name in ("exact_match", "rouge1", "rouge2", "rougeL"):
            assert found[name] == pytest.approx(logged[name], abs=1e-6), name
        report = json.loads(adapted.data_report.read_text())["val"]
        assert (found["tokens"], found["bytes"]) == (report["supervised_tokens"], report["supervised_bytes"])


def test_a_pretraining_runs_validation_comes_out_again(
    pretrained: RunDir, text_file: Path, tmp_path: Path, evaluate: Evaluate
) -> None:
    """By its prepared data, and by a file of the text that was held out."""
    text = text_file.read_text(encoding="utf-8")
    held_out = tmp_path / "held_out.md"
    held_out.write_text(text[len(text) - round(len(text) * 0.2) :], encoding="utf-8")
    [row] = evaluate(str(pretrained.path), "--data", "val", str(held_out))
    for data in ("val", str(held_out)):
        check(row["data"][data], pretrained)
        assert "exact_match" not in row["data"][data]
    assert "windows of 32" in " ".join(row["notes"]["val"])
    [strided] = evaluate(str(pretrained.path), "--data", "val", "--stride", "8")
    assert strided["data"]["val"]["tokens"] == row["data"]["val"]["tokens"]
    assert strided["data"]["val"]["loss"] != row["data"]["val"]["loss"]
    assert "at least 24 before each" in " ".join(strided["notes"]["val"])


@pytest.mark.slow
def test_forms_side_by_side(
    adapted: RunDir, tmp_path: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = ["adapter", "base", "merged", "bf16", "int8", "nf4", "base+nf4"]
    out = tmp_path / "out"
    answers = ("--answers", "3", "--max-new-tokens", "6")
    found = evaluate(
        str(adapted.path), "--data", "val", *answers, "--compare", ",".join(forms), "--out", str(out)
    )
    rows = {row["form"]: row for row in found}
    assert list(rows) == forms
    loss = {form: row["data"]["val"]["loss"] for form, row in rows.items()}
    assert loss["adapter"] == pytest.approx(last(adapted)["loss"], rel=RELATIVE)
    assert loss["merged"] == pytest.approx(loss["adapter"], rel=RELATIVE)
    assert loss["base"] > loss["adapter"] + 0.01
    assert loss["bf16"] == loss["adapter"], "the tiny base lies in bf16: nothing is rounded"
    others = [loss[form] for form in ("adapter", "base", "int8", "nf4", "base+nf4")]
    assert len(set(others)) == len(others)
    bits = {form: row["cost"]["bits_per_param"] for form, row in rows.items()}
    assert (bits["adapter"], bits["base"], bits["merged"], bits["bf16"]) == (32, 32, 32, 16)
    assert 8 < bits["int8"] < 8.6
    assert 4 < bits["nf4"] == bits["base+nf4"] < 4.5
    size = {form: row["cost"]["base_bytes"] for form, row in rows.items()}
    assert size["nf4"] < size["int8"] < size["adapter"] == size["base"] == size["merged"]
    for form in forms:
        difference = rows[form]["differences"]["val"]["loss"]
        assert difference == pytest.approx(loss[form] - loss["adapter"], abs=1e-12)
    assert json.loads((out / "results.json").read_text()) == found
    assert (out / "results.md").read_text().count("| nf4 |") == 2
    written = [json.loads(line) for line in (out / "answers-merged-val.jsonl").read_text().splitlines()]
    assert len(written) == 3
    assert {"prompt", "reference", "text", "exact_match", "rougeL", "stop_reason", "seed"} <= set(written[0])


@pytest.mark.slow
def test_a_base_alone_is_the_same_as_that_model(adapted: RunDir, evaluate: Evaluate) -> None:
    """The run's template, chat marks and length are asked of both."""
    settings = ["data.num_records=120", "data.val_fraction=0.2"]
    data = ["--data", "skills", "--answers", "0", *(part for each in settings for part in ("--set", each))]
    [of_run] = evaluate(str(adapted.path), "--compare", "base", *data)
    [alone] = evaluate(BASE, *data, "--set", "data.max_length=96", "--set", "data.template=brief")
    assert of_run["data"]["skills"]["loss"] == pytest.approx(alone["data"]["skills"]["loss"], rel=RELATIVE)


@pytest.mark.slow
def test_the_table_fits_80_columns(
    adapted: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [str(adapted.path), BASE, "--data", "val.jsonl", "--answers", "2", "--accelerator", "cpu"]
    file = adapted.path / "questions.jsonl"
    lines = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments[3] = str(file)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if not line.startswith(str(file))]
    assert max(len(line) for line in tables) <= 80
    [said] = [line for line in out.splitlines() if "trained with no template" in line]
    assert said.startswith(f"{file}, tiny-base: "), "said of that row alone"
    assert "4 records" in out
    assert "2 answers by sampler greedy (the first of 4; --answers)" in out
    for heading in (
        "loss",
        "Δ loss",
        "ppl",
        "bits/byte",
        "EM",
        "R-1",
        "R-L",
        "base MB",
        "bits/param",
        "peak GB",
    ):
        assert heading in out, heading


@pytest.mark.slow
def test_messages_and_completions(adapted: RunDir, tmp_path: Path, evaluate: Evaluate) -> None:
    completions, messages = tmp_path / "completions.jsonl", tmp_path / "messages.jsonl"
    completions.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 2, encoding="utf-8")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    messages.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    told = ["--set", "data.chat_template=chatml", "--set", "sampler.max_new_tokens=4", "--sampler", "top_k"]
    [row] = evaluate(str(adapted.path), "--data", str(completions), str(messages), *told, "--limit", "1")
    assert row["data"][str(completions)]["answers"] == row["data"][str(messages)]["answers"] == 1
    assert row["data"][str(completions)]["sampler"]["kind"] == "top_k"
    assert row["data"][str(completions)]["bytes"] == len(" 2")


@pytest.mark.slow
def test_triples_are_asked_of_a_chat_model_as_a_turn(
    train: Callable[..., RunDir], tmp_path: Path, evaluate: Evaluate
) -> None:
    """The same as the records written as messages."""
    triples, messages = tmp_path / "triples.jsonl", tmp_path / "messages.jsonl"
    rows = [{"instruction": f"Double {n}.", "input": "Please.", "output": str(2 * n)} for n in range(8)]
    turns = [
        [
            {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in rows
    ]
    triples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    messages.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns), encoding="utf-8")
    run = train("chat", *STEPS, "data=jsonl", f"data.path={messages}", "data.chat_template=chatml")
    answers = ("--answers", "2", "--max-new-tokens", "4")
    [row] = evaluate(str(run.path), "--data", str(triples), str(messages), *answers)
    found, expected = row["data"][str(triples)], row["data"][str(messages)]
    for name in ("loss", "tokens", "bytes", "exact_match", "rougeL", "answers"):
        assert found[name] == expected[name], name
    assert "asked as conversations" in " ".join(row["notes"][str(triples)])


@pytest.mark.slow
def test_the_quantization_report_is_written_beside_the_table(tmp_path: Path, evaluate: Evaluate) -> None:
    (tmp_path / "text.txt").write_text("Some words to measure, and some more. " * 4)
    folder = tmp_path / "report"
    told = ["--data", str(tmp_path / "text.txt"), "--compare", "none,int8"]
    assert main([BASE, *told, "--quantization-report", str(folder), "--accelerator", "cpu"]) == 0
    report = json.loads((folder / "quantization.json").read_text())
    assert [row["kind"] for row in report["kinds"]][1:] == ["int8"]
    assert report["tokens"] > 10


@pytest.mark.slow
def test_a_report_alone_is_the_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing else is on stdout; and storage that changes nothing is drawn without a warning."""
    (tmp_path / "text.txt").write_text("Some words to measure, and some more. " * 4)
    told = ["--compare", "int8", "--limit", "1", "--quantization-report", str(tmp_path / "report")]
    with_table = [BASE, "--data", str(tmp_path / "text.txt"), *told, "--answers", "0"]
    for given in ([BASE, *told], with_table):
        assert main([*given, "--accelerator", "cpu", "--json"]) == 0
        out, err = capfd.readouterr()
        found = json.loads(out)
        assert f"written: {tmp_path / 'report'}" in err
        rows = found["kinds"] if given is not with_table else found
        assert [row.get("kind", "int8") for row in rows][-1] == "int8"


def test_answers_to_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    texts = {"a/test.jsonl": [{"text": "of a"}], "b/test.jsonl": [{"text": "of b"}]}
    row = {
        "model": "m",
        "form": "as trained",
        "data": {},
        "suites": {},
        "notes": {},
        "cost": {"base_bytes": 1},
    }
    _write(tmp_path, [SimpleNamespace(texts=texts)], [row])
    kept = sorted(json.loads(file.read_text())["text"] for file in tmp_path.glob("answers-*.jsonl"))
    assert kept == ["of a", "of b"]


def test_no_difference_between_records_of_two_runs() -> None:
    """Each run's own validation side may be of other records; the same ones are subtracted."""

    def row(name: str, loss: float, held_out: str) -> dict[str, Any]:
        figures = {"loss": loss, "held_out": held_out}
        of = {"data": {"val": figures}, "notes": {"val": ["read"]}, "suites": {}, "cost": {"base_bytes": 1}}
        return {"model": f"runs/{name}", "form": "as trained", **of}

    first, same, other = row("first", 2.0, "x"), row("same", 2.5, "x"), row("other", 9.0, "y")
    assert [each["differences"]["val"] for each in with_differences([first, same, other])] == [
        {"loss": 0.0},
        {"loss": 0.5},
        {},
    ]
    (title, headings, rows), _ = tables([first, same, other])
    assert (title, headings) == ("val", ["", "loss", "Δ loss"])
    assert [cells[2] for cells in rows] == ["", "+0.5000", ""]
    assert tables([first, other])[0][1] == ["", "loss"]
    assert "not the first row's records in other" in markdown([first, other])
    assert "not the first row's" not in markdown([first, same])


REPORT = ["--quantization-report", "{tmp}/report"]
BAD: dict[str, tuple[list[str], list[str]]] = {
    "seed": ([BASE, "--data", "val", "--seed", "99999999999999999999"], ["out of range", "--seed"]),
    "no data": ([BASE], ["nothing to measure on", "--data"]),
    "unknown file": ([BASE, "--data", "nowhere.txt"], ["no such data file: nowhere.txt"]),
    "empty file": ([BASE, "--data", "{tmp}/empty.jsonl"], ["holds no record", "empty.jsonl"]),
    "blank text": ([BASE, "--data", "{tmp}/blank.txt"], ["blank.txt", "empty"]),
    "nothing supervised": (
        [BASE, "--data", "{tmp}/long.jsonl", "--set", "data.max_length=8", "--set", "data.too_long=drop"],
        ["nothing to measure", "dropped too long: 1"],
    ),
    "no model": (["{tmp}", "--data", "{tmp}/text.txt"], ["{tmp}"]),
    "no model there": (["no/such/model", "--data", "{tmp}/text.txt"], ["no/such/model"]),
    "no run": ([BASE, "--data", "val"], ["is no run", "give a data file"]),
    "side of a run's own": ([BASE, "--data", "val", "--side", "all"], ["--side", "--data val"]),
    "task of a run's own": ([BASE, "--data", "val", "--task", "sft"], ["--task", "--data val"]),
    "report of a run's own": ([BASE, "--data", "val", *REPORT], ["--data val is a run's own"]),
    "report of a part": (
        [BASE, "--data", "{tmp}/text.txt", "--side", "val", "--stride", "3", "--best", *REPORT],
        ["--best, --side, --stride", "--quantization-report"],
    ),
    "report of two": ([BASE, BASE, *REPORT], ["a second model", "--quantization-report"]),
    "report with a table's settings": ([BASE, "--out", "{tmp}/out", *REPORT], ["--out"]),
    "limit of a run's own": ([BASE, "--data", "val", "--limit", "3"], ["is measured whole", "--limit"]),
    "unknown sampler": (
        [BASE, "--data", "{tmp}/text.txt", "--sampler", "top_q"],
        ["unknown sampler 'top_q'", "top_p"],
    ),
    "unknown field": (
        [BASE, "--data", "{tmp}/text.txt", "--sampler", "greedy", "--set", "sampler.heat=1"],
        ["heat", "greedy"],
    ),
    "unknown form": ([BASE, "--data", "{tmp}/text.txt", "--compare", "nf5"], ["unknown form 'nf5'", "nf4"]),
    "no adapter": (
        [BASE, "--data", "{tmp}/text.txt", "--compare", "merged"],
        ["merged of a model without an adapter"],
    ),
    "unknown setting": (
        [BASE, "--data", "{tmp}/text.txt", "--set", "data.max_len=9"],
        ["data.max_len", "data.max_length"],
    ),
    "foreign setting": (
        [BASE, "--data", "{tmp}/text.txt", "--set", "optim.lr=9"],
        ["cannot set 'optim.lr=9'"],
    ),
    "stride too wide": (
        [BASE, "--data", "{tmp}/text.txt", "--set", "data.max_length=16", "--stride", "17"],
        ["a stride of 17 with windows of 16 tokens", "1 to 16"],
    ),
    "beyond the context": (
        [BASE, "--data", "{tmp}/text.txt", "--set", "data.max_length=100000"],
        ["data.max_length=100000 is beyond the model's context"],
    ),
    "too small": ([BASE, "--data", "{tmp}/text.txt", "--limit", "0"], ["0 is too small", "--limit"]),
    "tasks without a name": (
        [BASE, "--suite-path", "{tmp}", "--data", "{tmp}/text.txt"],
        ["--suite-path without --suite"],
    ),
    "no report folder": (
        [BASE, "--data", "{tmp}/text.txt", "--out", "{tmp}/text.txt/x"],
        ["cannot be made", "--out"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_is_one_line_and_exit_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD[case]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("Some words to measure. " * 4)
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"instruction": "say " * 50, "output": "word " * 50}) + "\n"
    )
    given = [each.replace("{tmp}", str(tmp_path)) for each in arguments]
    assert main([*given, "--accelerator", "cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    for word in words:
        assert word.replace("{tmp}", str(tmp_path)) in lines[0]


def test_a_run_whose_config_is_broken_is_not_read_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(BASE, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("data: [")
    (tmp_path / "text.txt").write_text("Some words to measure. " * 4)
    assert main([str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--accelerator", "cpu"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "the run's config cannot be read" in errors[0]


def test_the_script_does_not_stand_for_the_package_evaluate(tmp_path: Path) -> None:
    """Started as a person starts it, Python would find scripts/evaluate.py first; tasks of the harness import `evaluate`."""
    told = "import sys, importlib.util\nprint(importlib.util.find_spec('evaluate'), file=sys.stderr)\n"
    script = (ROOT / "scripts" / "evaluate.py").read_text(encoding="utf-8")
    copy = tmp_path / "evaluate.py"
    copy.write_text(script.replace("sys.exit(main())", told), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(copy)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(copy) not in done.stderr


def test_a_text_of_one_character_is_measured(tmp_path: Path, evaluate: Evaluate) -> None:
    """Shorter than most tokens, and still one token and the end mark to predict."""
    (tmp_path / "x.txt").write_text("x")
    [row] = evaluate(BASE, "--data", str(tmp_path / "x.txt"))
    found = row["data"][str(tmp_path / "x.txt")]
    assert (found["tokens"], found["bytes"]) == (2, 1)
