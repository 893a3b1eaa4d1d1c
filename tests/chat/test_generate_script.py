"""scripts/generate.py: files in, files out, several samplers and adapters, and one line for whatever is wrong."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmlab.generation.text import TextGenerator

from .conftest import BASE

Main = Callable[..., int]


@pytest.fixture
def generate(
    script: Callable[[str], ModuleType], base: Any, tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> Main:
    """The script's main with the two models of these tests, which are loaded once."""
    import lmlab.load

    def load(name: str, **options: Any) -> Any:
        assert options["accelerator"] == "cpu"
        return tuned if options["adapters"] or name != str(BASE) else base

    monkeypatch.setattr(lmlab.load, "load_for_use", load)
    main = script("generate").main
    return lambda *arguments: main([*arguments, "--accelerator", "cpu"])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_file_in_and_a_file_out_whatever_the_batches_are(generate: Main, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": text, "id": number}
        for number, text in enumerate(["Return", "The list of", "def f(", "If x"])
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = [
        str(BASE),
        "--prompts-file",
        str(asked),
        "--sampler",
        "greedy",
        "--sampler",
        "combined",
        "--max-new-tokens",
        "6",
    ]
    found = {}
    for size in ("1", "3"):
        out = tmp_path / f"out{size}.jsonl"
        assert generate(*told, "--batch-size", size, "--seed", "4", "--out", str(out)) == 0
        found[size] = lines(out)
    assert [(row["id"], row["sampler"], row["seed"]) for row in found["3"]] == [
        (number, sampler, 4 + number) for sampler in ("greedy", "combined") for number in range(4)
    ]
    for one, other in zip(found["1"], found["3"], strict=True):
        assert one.pop("mean_entropy") == pytest.approx(other.pop("mean_entropy"), rel=1e-4)
        assert one == other
        assert one["new_tokens"] == 6
        assert one["stop_reason"] == "length"


def test_adapters_by_name(generate: Main, adapters: dict[str, Path], tmp_path: Path) -> None:
    texts = set()
    for name in ("default", "two", "base"):
        out = tmp_path / f"{name}.jsonl"
        told = [
            str(adapters["one"]),
            "--adapter",
            f"two={adapters['two']}",
            "--use",
            name,
            "--prompt",
            "Count",
        ]
        assert generate(*told, "--sampler", "greedy", "--max-new-tokens", "8", "--out", str(out)) == 0
        texts.add(lines(out)[0]["text"])
    assert len(texts) == 3


def test_in_the_terminal(
    generate: Main, capsys: pytest.CaptureFixture[str], adapters: dict[str, Path]
) -> None:
    told = [
        str(adapters["one"]),
        "--prompt",
        "Count",
        "--prompt",
        "Sort",
        "--sampler",
        "greedy",
        "--max-new-tokens",
        "5",
    ]
    assert generate(*told) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("> Count\n")
    assert "\n> Sort\n" in whole
    assert generate(*told, "--stream") == 0
    assert capsys.readouterr().out == whole, "the same as it is written"
    assert (
        generate(*told[:3], "--sampler", "greedy", "--sampler", "top_k", "--max-new-tokens", "3", "--raw")
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("[greedy]\nCount")
    assert "\n[top_k]\nCount" in out


def test_from_standard_input(
    generate: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"first\nsecond\n")))
    assert generate(str(BASE), "-", "--max-new-tokens", "2", "--stop", "\n") == 0
    out = capsys.readouterr().out
    assert out.startswith("first")
    assert "\nsecond" in out


def test_an_interrupted_run_keeps_what_is_done(
    generate: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = TextGenerator.__call__, []

    def interrupted(self: TextGenerator, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    monkeypatch.setattr(TextGenerator, "__call__", interrupted)
    asked, out = tmp_path / "asked.txt", tmp_path / "out.jsonl"
    asked.write_text("".join(f"prompt {number}\n" for number in range(8)), encoding="utf-8")
    told = ["--prompts-file", str(asked), "--batch-size", "2", "--max-new-tokens", "2", "--out", str(out)]
    assert generate(str(BASE), *told) == 130
    assert [row["prompt"] for row in lines(out)] == [f"prompt {number}" for number in range(4)]
    assert capsys.readouterr().err == "\ninterrupted: 4 of 8 texts are written\n"


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_a_json_schema(generate: Main, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema, out = tmp_path / "schema.json", tmp_path / "out.jsonl"
    schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
    told = [
        "--prompt",
        "A number:",
        "--json-schema",
        str(schema),
        "--max-new-tokens",
        "40",
        "--out",
        str(out),
    ]
    assert generate(str(BASE), *told, "--sampler", "temperature") == 0
    (row,) = lines(out)
    assert row["stop_reason"] in ("complete", "eos", "length")
    if row["stop_reason"] == "complete":
        assert isinstance(json.loads(row["text"])["n"], int)
    assert row["text"].startswith("{")


LONG = "word " * 600


@pytest.mark.parametrize(
    ("told", "error"),
    [
        ([], "no prompt (--prompt): "),
        (["--prompt", "x", "--sampler", "gredy"], "unknown sampler 'gredy'"),
        (["--prompt", "x", "--sampler", "greedy", "--top-p", "0.9"], "top_p=0.9 is not allowed (sampler greedy): greedy has no top_p"),
        (["--prompt", "x", "--sampler", "top_k", "--top-k", "0"], "top_k=0 is not allowed"),
        (["--prompt", "x", "--use", "three"], "no adapter 'three' (adapter): "),
        (["--prompt", "x", "--adapter", "three"], "not a name and a directory: 'three' (--adapter): write NAME=DIR"),
        (["--prompt", "x", "--batch-size", "0"], "no batch (--batch-size): "),
        (["--prompt", "x", "--out", "/nowhere/out.jsonl"], "cannot be written: No such file or directory (/nowhere/out.jsonl)"),
        (["--prompt", LONG], "tokens and the model's context is 512 (--prompt): shorten it to at most 511 tokens"),
        (["--prompt", "x", "--system", "y"], "a system message needs a model trained on conversations (--prompt): "),
        (["--prompt", "x", "--seed", "99999999999999999999"], "the seed 99999999999999999999 is out of range (--seed): "),
        (["--prompt", "x", "--prompt", "y", "--seed", str(2**63 - 1)], f"the seed {2**63} is out of range (--seed): "),
        (["--prompt", "x", "--seed", "-1"], "the seed -1 is out of range (--seed): "),
        (["--prompt", "x", "--sampler", "../adapter/qlora"], "unknown sampler '../adapter/qlora'"),
        (["--prompt", "x", "--raw", "--system", "y"], "a system message with --raw (--system): "),
        (["--prompt", "x", "--out", "x.jsonl", "--stream"], "texts go to a file, not here (--stream): "),
        (["--prompt", "x", "--sampler", "greedy", "--sampler", "greedy"], "greedy is named twice (--sampler): "),
        (["-", "--prompts-file", "x"], "two sources of prompts (-): "),
        (["--prompts-file", "nowhere.txt"], "prompts cannot be read: No such file or directory (nowhere.txt): "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    generate: Main, capsys: pytest.CaptureFixture[str], told: list[str], error: str
) -> None:
    assert generate(str(BASE), *told) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert error in err
    assert err.count("\n") == 1


def test_prompts_are_not_overwritten_and_a_long_one_names_its_line(
    generate: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked.txt"
    asked.write_text(f"short\n\n{LONG}\n", encoding="utf-8")
    assert generate(str(BASE), "--prompts-file", str(asked), "--out", str(asked)) == 2
    assert "the prompts would be overwritten" in capsys.readouterr().err
    kept = tmp_path / "out.jsonl"
    kept.write_text("of an earlier run\n", encoding="utf-8")
    assert generate(str(BASE), "--prompts-file", str(asked), "--out", str(kept)) == 2
    assert f"({asked}:3): shorten it" in capsys.readouterr().err
    assert kept.read_text(encoding="utf-8") == "of an earlier run\n", "nothing was written yet"


def test_what_a_line_says_itself_is_not_lost(
    generate: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "x"}\n{"prompt": "y", "text": "mine"}\n', encoding="utf-8")
    assert generate(str(BASE), "--prompts-file", str(asked), "--out", str(out)) == 2
    said = f"its field text would be overwritten in the output ({asked}:2): "
    assert said in capsys.readouterr().err
    assert not out.exists()
    asked.write_text('{"prompt": "x", "system": "Be brief."}\n', encoding="utf-8")
    assert generate(str(BASE), "--prompts-file", str(asked), "--raw") == 2
    assert f"a system message with --raw ({asked}:1): " in capsys.readouterr().err


def test_the_old_file_is_there_until_the_first_text(
    generate: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "__call__", interrupted)
    out = tmp_path / "out.jsonl"
    out.write_text("of an earlier run\n", encoding="utf-8")
    assert generate(str(BASE), "--prompt", "x", "--out", str(out)) == 130
    assert capsys.readouterr().err == "\ninterrupted: 0 of 1 texts are written\n"
    assert out.read_text(encoding="utf-8") == "of an earlier run\n"


def test_a_stop_string_with_a_backslash_is_said(generate: Main, capsys: pytest.CaptureFixture[str]) -> None:
    told = [str(BASE), "--prompt", "x", "--max-new-tokens", "1", "--stop"]
    assert generate(*told, "\\n\\n") == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: --stop ")
    assert "in bash write $'\\n'" in err
    assert generate(*told, "\n") == 0
    assert capsys.readouterr().err == ""
