"""The data block on the terminal: readable at every width, with and without colour, and safe whatever the data holds."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from lmlab.tracking.terminal import ASCII_BLOCKS, BLOCKS, MAX_LINES, print_data

PREVIEW = "outputs/sft/run/mask_preview.txt"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Stream(io.TextIOWrapper):
    """A stream of some encoding whose bytes can be read back."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")

    def written(self) -> str:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


def printed(
    report: dict[str, Any],
    examples: Any,
    *,
    width: int = 80,
    encoding: str = "utf-8",
    masked: bool = True,
    **console: Any,
) -> str:
    stream = Stream(encoding)
    print_data(Console(file=stream, width=width, **console), report, examples, masked=masked, preview=PREVIEW)
    return stream.written()


def test_the_counts_reasons_lengths_and_places(
    data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    lines = [line.rstrip() for line in printed(data_report, examples).splitlines()]
    assert lines[:9] == [
        "records     100 read, 96 kept, 4 dropped, 2 truncated (2.1%)",
        "dropped     3 empty output (first: a.jsonl:7: output is '')",
        "dropped     1 broken JSON (first: a.jsonl:9: [/] <b> ␛[0m)",
        "tokens      4,800, 1,200 of them trained (25.0%)",
        "packed      20 rows, 97.0% full",
        "lengths     10 to 169 tokens, median 45",
        f"            10 {BLOCKS[8]}{BLOCKS[5]} {BLOCKS[1]} 169",
        "longest     169 tokens: a.jsonl:12",
        "shortest    10 tokens: a.jsonl:3",
    ]
    assert lines[9] == f"what is trained: the text between ⟦ and ⟧ (3 more examples in {PREVIEW})"
    assert lines[10:13] == [
        "  a.jsonl:1: 40 tokens, 10 trained (25%)",
        "  │ Q: 1 + 1",
        "  │ A:⟦ 2<EOS>⟧",
    ]


@pytest.mark.parametrize("width", [20, 40, 80, 120, 250])
def test_no_line_of_an_example_is_wider_than_the_terminal(
    data_report: dict[str, Any], examples: list[dict[str, Any]], width: int
) -> None:
    for first in range(5):
        shown = printed(data_report, examples[first:], width=max(width, 40))
        body = [line for line in shown.splitlines() if line.startswith("  │ ")]
        assert body
        assert max(cell_len(line) for line in body) <= max(width, 40)


def test_a_long_example_keeps_both_ends_of_its_spans_in_view(
    data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    for width in (60, 80, 120):
        shown = printed(data_report, [examples[3]], width=width)
        body = [line[4:] for line in shown.splitlines() if line.startswith("  │ ")]
        assert len(body) <= MAX_LINES
        text = "\n".join(body)
        assert text.startswith("first words middle")
        assert "last words\n⟦begun and on" in text
        assert text.endswith("ended<EOS>⟧")
        assert text.count("…") == 2


def test_a_conversation_of_many_turns_is_cut_and_said(
    data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    body = [line for line in printed(data_report, [examples[4]]).splitlines() if line.startswith("  │ ")]
    assert len(body) == MAX_LINES
    assert body[0].startswith("  │ turn 0↵⟦turn 1↵⟧turn 2") or body[0] == "  │ turn 0"
    assert re.fullmatch(r"  │ … \d+ more lines?", body[-1])


def test_colour_instead_of_marks_on_a_terminal(
    data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    shown = printed(data_report, examples, force_terminal=True, color_system="standard")
    assert "⟦" not in shown
    assert "\x1b[1;32m 2<EOS>\x1b[0m" in shown
    assert "\x1b[2mA:\x1b[0m" in shown
    assert "\x1b[31m" not in shown


def test_no_colour_means_marks_on_a_terminal_too(
    data_report: dict[str, Any], examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = printed(data_report, examples, force_terminal=True)
    assert "A:⟦ 2<EOS>⟧" in ESCAPE.sub("", shown)
    assert "\x1b[1;32m" not in shown


def test_data_is_neither_markup_nor_obeyed(
    data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    shown = printed(data_report, examples[1:2], width=200)
    assert '⟦told: <script>alert(1)</script> & "q" [bold red]not markup[/] ␛[31mred␇ \\u202eturned' in shown
    assert "שלום 😀<EOS>⟧" in shown
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\u202c"}


def test_a_stream_that_is_not_utf8_gets_ascii(
    data_report: dict[str, Any], examples: list[dict[str, Any]]
) -> None:
    warned = data_report | {"records_truncated": 50}
    for first in range(5):
        shown = printed(warned, examples[first:], encoding="ascii")
        assert shown.isascii()
    shown = printed(warned, examples, encoding="ascii")
    assert "A:[[ 2<EOS>]]" in shown
    assert f"10 {ASCII_BLOCKS[8]}{ASCII_BLOCKS[5]} {ASCII_BLOCKS[1]} 169" in shown
    assert "\\x1b[31mred\\x07" in shown


def test_a_warning_is_one_line_with_the_key(data_report: dict[str, Any]) -> None:
    shown = printed(data_report | {"records_truncated": 50}, [], width=60)
    assert "warning: 52.1% of the records are cut to fit: raise data.max_length, or leave them out by data.too_long=drop\n" in shown  # fmt: skip
    full = data_report | {"supervised_tokens": 4800}
    assert "warning: every token is trained" in printed(full, [])
    assert "warning" not in printed(full, [], masked=False)


def test_a_mix_names_its_sources(data_report: dict[str, Any]) -> None:
    sources = [
        {"name": "[b]a", "weight": 3.0, "records_kept": 60, "tokens": 3000},
        {"name": "hub", "weight": 1, "records_kept": 36, "tokens": 1800},
    ]
    shown = printed(data_report | {"sources": sources}, [])
    assert "source      [b]a: weight 3, 60 records, 3,000 tokens" in shown
    assert "source      hub: weight 1, 36 records, 1,800 tokens" in shown


def test_a_report_of_an_older_run_prints_what_it_has() -> None:
    old = {"records_read": 5, "records_kept": 4, "records_dropped": {"empty": 1}, "records_truncated": 0}
    assert [line.rstrip() for line in printed(old, []).splitlines()] == [
        "records     5 read, 4 kept, 1 dropped, 0 truncated",
        "dropped     1 empty",
    ]
    assert printed({}, None).strip() == ""


def test_documents_of_one_length_need_no_histogram(data_report: dict[str, Any]) -> None:
    same = {"mean": 64.0, "median": 64.0, "shortest": 64, "longest": 64}
    histogram = {"edges": [64, 65], "counts": [96]}
    shown = printed(data_report | {"tokens_per_record": same, "length_histogram": histogram}, [])
    assert "lengths     64 tokens each" in shown
    assert "longest" not in shown
