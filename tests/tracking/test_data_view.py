"""One view of the data report for every reader: counts, reasons with their first place, warnings, and odd files."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmlab.tracking.data_view import DataView, Dropped, Lengths
from lmlab.tracking.values import visible, writable


def test_reasons_come_with_their_first_place_and_the_most_frequent_first(data_report: dict[str, Any]) -> None:
    view = DataView.of(data_report, [])
    assert view.dropped == (
        Dropped("empty output", 3, "a.jsonl:7", "output is ''"),
        Dropped("broken JSON", 1, "a.jsonl:9", "[/] <b> \x1b[0m"),
    )
    assert view.total_dropped == 4
    assert [row.where for row in view.dropped_examples] == ["a.jsonl:7", "a.jsonl:9", "a.jsonl:30"]


def test_the_table_has_every_count_and_the_share_it_is_of(data_report: dict[str, Any]) -> None:
    rows = {name: (value, share) for name, value, share in DataView.of(data_report, []).rows}
    assert rows["records_kept"] == ("96", "96.0% of those read")
    assert rows["records_dropped: empty output"] == ("3", "3.0% of those read")
    assert rows["records_truncated"] == ("2", "2.1% of those kept")
    assert rows["supervised_tokens"] == ("1,200", "25.0% of the tokens")
    assert rows["train/supervised_bytes"] == ("2,000", "")
    assert not {name for name in rows if "histogram" in name or "longest/" in name or "examples" in name}


def test_the_lengths_are_the_reports_own(data_report: dict[str, Any]) -> None:
    assert DataView.of(data_report, []).lengths == Lengths((10, 50, 90, 130, 170), (60, 35, 0, 1), 45.0)


def test_marks_enclose_the_trained_text_and_its_eos(examples: list[dict[str, Any]]) -> None:
    shown = DataView.of({}, examples).examples
    assert shown[0].marked == "Q: 1 + 1\nA:⟦ 2<EOS>⟧"
    assert shown[2].marked == "Tell a story.\n⟦Once upon⟧"
    assert shown[2].about == "40 tokens, 10 trained (25%), truncated"


@pytest.mark.parametrize(
    ("change", "masked", "warned"),
    [
        ({}, True, []),
        ({"records_truncated": 4}, True, []),
        ({"records_truncated": 5}, True, ["5.2% of the records are cut to fit: raise data.max_length"]),
        ({"supervised_tokens": 47}, True, ["only 0.98% of the tokens are trained"]),
        ({"supervised_tokens": 4800}, True, ["every token is trained, nothing is masked"]),
        # Of documents of their own, the first token of each has nothing before it and counts as untrained.
        ({"supervised_tokens": 4800 - 96}, True, ["every token is trained, nothing is masked"]),
        ({"supervised_tokens": 4800 - 97}, True, []),
        ({"supervised_tokens": 4800}, False, []),
        ({"records_kept": 0, "tokens": 0, "supervised_tokens": 0}, True, []),
    ],
)
def test_what_is_probably_not_meant_is_warned_about(
    data_report: dict[str, Any], change: dict[str, int], masked: bool, warned: list[str]
) -> None:
    found = DataView.of(data_report | change, []).warnings(masked=masked)
    assert len(found) == len(warned)
    for line, beginning in zip(found, warned, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    "histogram",
    [None, 3, {"edges": [1, 2]}, {"edges": [1, 2], "counts": [1, 2]}, {"edges": [2, 1], "counts": [1]},
     {"edges": [1, 2], "counts": [0]}, {"edges": [1, "x"], "counts": [1]}, {"edges": [1, 2], "counts": [-1]},
     {"edges": [1, math.inf], "counts": [1]}, {"edges": [], "counts": []}, {"edges": [0, 10**400], "counts": [1]}],
)  # fmt: skip
def test_a_histogram_that_is_none_is_left_out(data_report: dict[str, Any], histogram: Any) -> None:
    assert DataView.of(data_report | {"length_histogram": histogram}, []).lengths is None


@pytest.mark.parametrize("odd", [None, "x", True, [1], [[1]], {"a": 1}, math.nan, 1e308, 10**400, 0, -1])
def test_values_of_the_wrong_kind_are_left_out_and_never_raised(
    data_report: dict[str, Any], examples: list[dict[str, Any]], odd: Any
) -> None:
    view = DataView.of(dict.fromkeys(data_report, odd), odd)
    view.warnings(masked=True)
    assert view.examples == ()
    row = DataView.of(data_report, [dict.fromkeys(examples[0], odd)]).examples[0]
    assert row.marked in ("", "a")
    assert row.about


@pytest.mark.parametrize(
    ("text", "seen"),
    [("a\tb\nc", "a\tb\nc"), ("\x1b[31m\r\x00\x7f", "␛[31m␍␀␡"), ("\x9b1m", "\\x9b1m"),
     ("\u202ex\u2066", "\\u202ex\\u2066"), ("a\u2028b", "a\\u2028b"), ("👩‍👧 שלום", "👩‍👧 שלום")],
)  # fmt: skip
def test_characters_that_act_are_shown_and_others_left_alone(text: str, seen: str) -> None:
    assert visible(text) == seen


@pytest.mark.parametrize(
    ("text", "encoding", "seen"),
    [("é 😀", "utf-8", "é 😀"), ("é 😀", "latin-1", "é \\U0001f600"), ("\x1bé", "ascii", "\\x1b\\xe9"),
     ("a\ud800", "utf-8", "a\\ud800")],
)  # fmt: skip
def test_what_a_stream_cannot_carry_is_escaped(text: str, encoding: str, seen: str) -> None:
    assert writable(text, encoding) == seen
