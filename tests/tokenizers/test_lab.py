"""``train_tokenizer.py -m``: every combination trained and measured, one page, and what a user can get wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.config.compose import compose_config, run_app
from lmlab.data.prepare import training_texts
from lmlab.records import UserError
from lmlab.tokenizer_lab.compare import free_folder, train_command
from lmlab.tokenizer_lab.options import LAB, LabConfig
from lmlab.tokenizer_lab.texts import held_out_groups
from lmlab.tokenizers import load_tokenizer
from lmlab.tracking import tokenizer_page

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "The quick brown fox jumps over the lazy dog. In 1984 the café was déjà vu.\n" * 60
FRENCH = "Le café déjà vu, la forêt et les élèves.\n" * 5
CODE = [
    {"language": "python", "text": "def f(x):\n    return x + 1\n"},
    {"language": "rust", "text": "fn f() {}"},
]
Lab = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    (root / "train.txt").write_text(TRAIN, encoding="utf-8")
    (root / "french.txt").write_text(FRENCH, encoding="utf-8")
    (root / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE), encoding="utf-8")
    return root


def run(folder: Path, *arguments: str, multirun: bool = True) -> int:
    """The script's own call, in this process."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from train_tokenizer import train  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    told = [
        "data=text",
        f"data.path={folder}/train.txt",
        f"output_root={folder}/out",
    ]
    sys.argv = ["train_tokenizer.py", *(["-m"] if multirun else []), *told, *arguments]
    return run_app(train, config_name="train_tokenizer", own=LAB)


@pytest.fixture
def lab(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    """``lab(*arguments, multirun=True)`` -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.chdir(folder)

    def call(*arguments: str, multirun: bool = True) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(folder, *arguments, multirun=multirun)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """One comparison: 261 is all bytes, four specials and one merge; 100 is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setenv("GOMP_SPINCOUNT", "1")
        patch.chdir(folder)
        code = run(
            folder,
            "tokenizer.vocab_size=258,261,300",
            "tokenizer.pre_tokenizer=gpt2,none",
            "run_name=made",
            f"lab.texts=[{folder}/french.txt,{folder}/code.jsonl]",
            "lab.against=[lmlab:tiny-base]",
        )
    assert code == 0
    return folder / "out" / "tokenizers" / "made"


@pytest.fixture(scope="module")
def results(made: Path) -> dict[str, Any]:
    return json.loads((made / "results.json").read_text(encoding="utf-8"))


def test_every_combination_is_a_row_in_order_and_one_that_cannot_be_is_refused(
    results: dict[str, Any],
) -> None:
    rows = results["tokenizers"]
    labels = ["258 gpt2", "258 none", "261 gpt2", "261 none", "300 gpt2", "300 none", "tiny-base"]
    assert [row["label"] for row in rows] == labels
    assert all(row["status"].startswith("refused: vocab_size 258 cannot hold") for row in rows[:2])
    assert [row["status"] for row in rows[2:]] == ["trained"] * 4 + ["loaded"]
    assert [row["vocab_size"] for row in rows[2:6]] == [261, 261, 300, 300]


def test_texts_are_grouped_by_file_and_field_and_their_bytes_are_the_same_for_all(
    results: dict[str, Any],
) -> None:
    assert list(results["groups"]) == ["french", "code: python", "code: rust"]
    sizes = [len(text.encode()) for text in (FRENCH, CODE[0]["text"], CODE[1]["text"])]
    for row in results["tokenizers"][2:]:
        assert [group["size_bytes"] for group in row["groups"].values()] == sizes
        assert row["total"]["size_bytes"] == sum(sizes)
        assert row["total"]["tokens"] == sum(group["tokens"] for group in row["groups"].values())
        assert row["total"]["exact"] == row["total"]["texts"] == 3


def test_a_figure_is_what_the_written_tokenizer_gives(results: dict[str, Any], made: Path) -> None:
    for row in results["tokenizers"][2:6]:
        tokenizer = load_tokenizer(made / Path(row["path"]).name)
        tokens = len(tokenizer(FRENCH, add_special_tokens=False).input_ids)
        assert row["groups"]["french"]["tokens"] == tokens
        assert row["groups"]["french"]["bytes_per_token"] == len(FRENCH.encode()) / tokens
    small, large = (results["tokenizers"][i]["total"]["bytes_per_token"] for i in (2, 4))
    assert 1 <= small < large


def test_the_embedding_costs_rows_times_hidden_size_of_the_model(results: dict[str, Any]) -> None:
    cost = results["tokenizers"][4]["embedding"]
    assert (cost["rows"], cost["hidden_size"], cost["model"], cost["model_is_tied"]) == (
        300,
        192,
        "llama_tiny",
        True,
    )
    assert cost["tied"]["parameters"] == 300 * 192
    assert cost["untied"]["parameters"] == 2 * 300 * 192
    # llama_tiny without its embedding: README has 2,828,736 parameters with a vocabulary of 2,048.
    assert cost["tied"]["share"] == pytest.approx(57_600 / (57_600 + 2_828_736 - 2048 * 192))


def test_the_table_has_a_row_for_each_tokenizer_and_group(results: dict[str, Any], made: Path) -> None:
    with (made / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 5 * 4
    first = [row for row in rows if row["tokenizer"] == "300 gpt2"]
    assert [row["group"] for row in first] == ["all", "french", "code: python", "code: rust"]
    assert (
        float(first[1]["bytes_per_token"]) == results["tokenizers"][4]["groups"]["french"]["bytes_per_token"]
    )


def test_the_page_needs_nothing_from_outside_and_shows_every_tokenizer(
    results: dict[str, Any], made: Path
) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!#)|@import|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    for row in results["tokenizers"][2:]:
        assert page.count(row["label"]) >= 5
    assert page.count('class="card"') == 5 * 3
    assert "refused: vocab_size 258" in page
    # A byte-level tokenizer of few merges has two tokens for an é: the piece carries the number.
    assert re.search(r'<i data-n="2">é</i>', page)
    assert page == tokenizer_page.render(results)


def test_the_page_escapes_what_texts_hold(results: dict[str, Any]) -> None:
    poisoned = json.loads(json.dumps(results).replace("french", "<script>alert(1)</script>"))
    page = tokenizer_page.render(poisoned)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_each_command_names_its_tokenizer_and_the_data(results: dict[str, Any], folder: Path) -> None:
    trained = [row for row in results["tokenizers"] if row["status"] == "trained"]
    for row in trained:
        words = shlex.split(row["command"])
        assert words[:3] == ["python", "train.py", "task=pretrain"]
        assert f"data.path={folder}/train.txt" in words
        assert words[-2:] == ["tokenizer=file", f"tokenizer.path={row['path']}"]
        assert not any(word.startswith(("lab.", "run_name", "tokenizer.vocab_size")) for word in words)
    (value,) = [
        w for w in shlex.split(tokenizer_page.sweep_command(trained)) if w.startswith("tokenizer.path=")
    ]
    assert value == "tokenizer.path=" + ",".join(row["path"] for row in trained)


@pytest.mark.parametrize("told", [["--config-dir", "my conf"], ["--config-dir=my conf"], ["-cd", "my conf"]])
def test_a_command_names_the_folder_of_its_own_config_files(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", "-m", *told, "model=mine"])
    words = shlex.split(train_command(["model=mine"], "out/a"))
    assert words[:5] == ["python", "train.py", "--config-dir", "my conf", "task=pretrain"]


def test_a_path_that_hydra_would_read_otherwise_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py"])
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for path in ("out/a b/1-x=y,z", "out/it's", "out/plain-1.5"):
        words = shlex.split(train_command(["tokenizer=bpe", "seed=3", "lab.texts=[a]"], path))
        assert words[:5] == ["python", "train.py", "task=pretrain", "seed=3", "tokenizer=file"]
        assert OverridesParser.create().parse_override(words[5]).value() == path
    rows = [{"status": "trained", "command": train_command([], path)} for path in ("out/a b", "out/c")]
    swept = shlex.split(tokenizer_page.sweep_command(rows))
    assert swept[:3] == ["python", "train.py", "-m"]
    override = OverridesParser.create().parse_override(swept[-1])
    assert list(override.sweep_string_iterator()) == ["'out/a b'", "out/c"]


def test_without_texts_the_validation_side_is_measured(lab: Lab, folder: Path) -> None:
    code, out, _ = lab("tokenizer.vocab_size=270,280", "run_name=val")
    assert code == 0
    results = json.loads((folder / "out/tokenizers/val/results.json").read_text(encoding="utf-8"))
    ((name, size),) = results["groups"].items()
    assert name == "train (validation)"
    assert 0 < size["characters"] < 0.1 * len(TRAIN)  # data.val_fraction is 0.05
    assert "measured on the validation side" in out
    assert "val/bits_per_byte" in out
    code, _, err = lab("tokenizer.vocab_size=270,280", "run_name=val")
    assert code == 2
    assert "already exists" in err


def test_a_mix_is_measured_by_source_and_field(folder: Path) -> None:
    rows = [{"lang": lang, "text": f"{lang} {i}"} for lang in ("eng", "fra") for i in range(60)]
    (folder / "langs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = f"data.sources=[{{kind: text, path: {folder}/train.txt, weight: 1}}, {{path: {folder}/langs.jsonl, weight: 1}}]"
    config = compose_config(["task=pretrain", "data=mix", sources, "data.val_fraction=0.2"])
    groups, notes = held_out_groups(lab_config(), [config, config], compose_config)
    assert set(groups) == {"train (validation)", "langs: eng (validation)", "langs: fra (validation)"}
    assert all(text.startswith("fra ") for text in groups["langs: fra (validation)"])
    assert 0 < len(groups["langs: eng (validation)"]) < 40
    assert notes == ["measured on the validation side of data, which no tokenizer trained here has seen"]


def lab_config(*texts: str) -> LabConfig:
    return LabConfig(
        texts=list(texts), group_by=["lang"], against=[], hidden_size=None, max_chars=10_000, excerpt_chars=0
    )


def test_a_text_of_a_mix_was_trained_on_too(folder: Path) -> None:
    sources = f"data.sources=[{{kind: text, path: {folder}/train.txt, weight: 1}}]"
    config = compose_config(["task=pretrain", "data=mix", sources])
    _, notes = held_out_groups(lab_config(f"{folder}/train.txt"), [config], compose_config)
    assert notes == [f"{folder}/train.txt is among the training text of these tokenizers"]


def test_files_of_one_name_are_groups_of_their_own(folder: Path, tmp_path: Path) -> None:
    config = compose_config(["task=pretrain", "data=text", f"data.path={folder}/train.txt"])
    given = [str(tmp_path / name) for name in ("en/test.txt", "fr/test.txt", "other.txt", "*/t*.txt")]
    for path in given[:3]:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(path, encoding="utf-8")
    groups, _ = held_out_groups(lab_config(*given), [config], compose_config)
    assert groups == {
        given[0]: [given[0]],
        given[1]: [given[1]],
        "other": [given[2]],
        given[3]: given[:2],
    }


def test_validation_sides_that_differ_are_said(folder: Path) -> None:
    data = ["task=pretrain", "data=text", f"data.path={folder}/train.txt"]
    told = (["data.max_length=64"], ["data.max_length=128"], ["data.val_fraction=0.5"])
    same, longer, other = (compose_config([*data, *more]) for more in told)
    groups, notes = held_out_groups(lab_config(), [same], compose_config)
    assert held_out_groups(lab_config(), [same, longer], compose_config) == (groups, notes)
    _, notes = held_out_groups(lab_config(), [same, other], compose_config)
    (note,) = notes
    assert note.startswith("measured on the validation sides of 2 settings of data")


def test_there_is_no_one_command_where_the_data_differ_too() -> None:
    commands = [train_command([f"data.path={path}"], f"out/{path}") for path in ("a", "a", "b")]
    rows = [{"status": "trained", "command": command} for command in commands]
    assert "tokenizer.path=out/a,out/a" in tokenizer_page.sweep_command(rows[:2])
    assert tokenizer_page.sweep_command(rows) == ""


def test_a_place_that_cannot_be_written_to_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be written to"):
        free_folder(str(folder / "train.txt"), "name", overwrite=False)


def test_nobody_reads_what_it_prints(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``... | head -1``: the page is made all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code, _, err = lab("tokenizer.vocab_size=270,280", "run_name=head")
    assert (code, err) == (0, "")
    assert (folder / "out/tokenizers/head/report.html").exists()


@pytest.mark.slow
def test_a_named_data_set_is_measured_on_its_validation_side() -> None:
    lab = LabConfig(
        texts=["skills"], group_by=[], against=[], hidden_size=None, max_chars=10_000, excerpt_chars=0
    )
    config = compose_config(["task=pretrain", "data=skills"])
    groups, _ = held_out_groups(lab, [config], compose_config)
    training = set(training_texts(config.data, task="pretrain"))
    assert list(groups) == ["skills"]
    assert len(groups["skills"]) > 20
    assert not training & set(groups["skills"][:-1])  # the last one is cut at max_chars


@pytest.mark.slow
def test_text_that_was_trained_on_and_the_same_tokenizer_twice_are_said(lab: Lab, folder: Path) -> None:
    # 60 equal lines hold fewer pairs than 900: both end at the same vocabulary.
    code, out, _ = lab(
        "tokenizer.vocab_size=900,1000",
        f"lab.texts=[{folder}/train.txt]",
        "lab.max_chars=100",
        "run_name=same",
    )
    assert code == 0
    assert "train.txt is among the training text" in out
    assert "only the first 100 characters" in out
    results = json.loads((folder / "out/tokenizers/same/results.json").read_text(encoding="utf-8"))
    assert [row["same_as"] for row in results["tokenizers"]] == [None, "900"]
    assert results["tokenizers"][0]["total"]["characters"] == 100


def test_characters_that_are_lost_are_shown(lab: Lab, folder: Path) -> None:
    code, _, _ = lab(
        "tokenizer=chars,bpe",
        f"lab.texts=[{folder}/french.txt]",
        "run_name=lossy",
    )
    assert code == 0
    results = json.loads((folder / "out/tokenizers/lossy/results.json").read_text(encoding="utf-8"))
    chars, bpe = results["tokenizers"]
    assert (chars["total"]["exact"], bpe["total"]["exact"]) == (0, 1)
    assert "<|unk|>" in chars["groups"]["french"]["loss"]["after"]
    assert "Texts that do not come back" in (folder / "out/tokenizers/lossy/report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("arguments", "where", "message"),
    [
        (("lab.texts=[nothing.txt]",), "lab.texts=nothing.txt", "no such data file"),
        (("lab.texts=[]", "lab.max_chars=1,2"), "lab.max_chars", "one for the whole page"),
        (("lab.against=[./nowhere]",), "nowhere", "no such tokenizer"),
        (("lab.max_chars=0",), "lab.max_chars", ""),
        (("lab.textz=[a.txt]",), "lab.textz", ""),
        (("lab.texts=[many.jsonl]",), "lab.group_by", "more than 64 groups"),
        (("lab.texts=[empty.jsonl]",), "empty.jsonl", "holds no record"),
        (
            ("tokenizer.vocab_size=300,400", "tokenizer.pre_tokenizer=words"),
            "tokenizer.pre_tokenizer",
            "words",
        ),
        (
            ("tokenizer=file", "tokenizer.path=french.txt"),
            "tokenizer",
            "is not trained",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    lab: Lab, folder: Path, arguments: tuple[str, ...], where: str, message: str
) -> None:
    rows = [{"language": f"l{i}", "text": "x"} for i in range(70)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    code, _, err = lab("run_name=wrong", *arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    assert where in line
    assert message in line
    assert not (folder / "out/tokenizers/wrong/report.html").exists()


def test_without_m_one_is_trained_and_keys_of_the_page_are_refused(lab: Lab, folder: Path) -> None:
    code, out, _ = lab("tokenizer.vocab_size=290", "run_name=one", multirun=False)
    assert code == 0
    assert len(load_tokenizer(folder / "out/tokenizers/one")) == 290
    assert "use it: python train.py task=pretrain data=text" in out
    assert not (folder / "out/tokenizers/one/report.html").exists()
    code, _, err = lab("lab.excerpt_chars=3", "run_name=other", multirun=False)
    assert code == 2
    assert "comparison of several tokenizers (lab.excerpt_chars=3): add -m" in err
    code, _, err = lab("lab.excerpt=3", "run_name=other", multirun=False)
    assert code == 2
    assert "lab.excerpt" in err


@pytest.mark.slow
def test_the_printed_command_pretrains_and_logs_bits_per_byte(results: dict[str, Any], folder: Path) -> None:
    (row,) = [row for row in results["tokenizers"] if row["label"] == "300 gpt2"]
    words = shlex.split(row["command"])[1:]
    told = [
        "run_name=from_lab",
        "trainer.max_steps=2",
        "logger=none",
        "trainer.accelerator=cpu",
        "data.max_length=64",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:], *told],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = (folder / "out/pretrain/from_lab/metrics.jsonl").read_text(encoding="utf-8")
    assert "val/bits_per_byte" in metrics
    assert len(load_tokenizer(folder / "out/pretrain/from_lab/tokenizer")) == 300
