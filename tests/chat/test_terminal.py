"""The conversation in the terminal, line by line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmlab.chat.dialogue import Dialogue
from lmlab.chat.terminal import Terminal
from lmlab.config.named import named_sampler


def talk(usable: Any, *lines: str | BaseException) -> tuple[Terminal, int]:
    """A session of these lines, which end it (or raise, as a person's Ctrl-C does)."""
    coming = iter([*lines, EOFError()])

    def read(_: str) -> str:
        line = next(coming)
        if isinstance(line, BaseException):
            raise line
        return line

    sampler = named_sampler("greedy", {"max_new_tokens": 8})
    terminal = Terminal(Dialogue(usable), sampler=sampler, seed=5, read=read)
    return terminal, terminal.run()


def test_a_conversation(base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    terminal, code = talk(base, "Hello", "", "//not a command", "/seed 11", "again")
    assert code == 0
    assert [turn["content"] for turn in terminal.turns[::2]] == ["Hello", "/not a command", "again"]
    assert [turn["role"] for turn in terminal.turns] == ["user", "assistant"] * 3
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("The whole conversation is sent")
    assert [seed in out for seed in ("; seed 5]", "; seed 6]", "; seed 11]")] == [True] * 3
    for turn in terminal.turns[1::2]:
        assert turn["content"] in out


def test_commands(tuned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    terminal, _ = talk(
        tuned, "/help", "/adapter", "/adapter two", "/system Be brief.", "/sampler top_k top_k=3 max_new_tokens=4",
        "/sampler top_k=2", "Count", "/reset",
    )  # fmt: skip
    assert (terminal.adapter, terminal.system, terminal.turns) == ("two", "Be brief.", [])
    assert terminal.sampler.model_dump() == {
        **terminal.sampler.model_dump(), "kind": "top_k", "top_k": 2, "max_new_tokens": 4
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert err == ""
    assert "/reset               begin anew" in out
    assert "adapters: default, two, base" in out
    assert "answers now come from two. The whole conversation is sent" in out
    assert "[4 tokens, cut at max_new_tokens; seed 5]" in out


def test_constraints_stay_with_another_sampler_and_lists_may_hold_blanks(base: Any) -> None:
    terminal, _ = talk(
        base,
        """/sampler stop=["a b", 'c d'] begins_with=Don't repetition_penalty=1.5""",
        "/sampler top_k top_k=3",
    )
    kept = {"stop": ["a b", "c d"], "begins_with": "Don't", "repetition_penalty": 1.5, "max_new_tokens": 8}
    assert terminal.sampler == named_sampler("top_k", {**kept, "top_k": 3})
    terminal, _ = talk(base, '/sampler stop=["\\n"] max_new_tokens=4')
    assert terminal.sampler == named_sampler("greedy", {"stop": ["\n"], "max_new_tokens": 4})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/rset", "unknown command '/rset' (command): "),
        ("/adapter three", "no adapter 'three' (adapter): "),
        ("/sampler gredy", "unknown sampler 'gredy' (sampler): "),
        ("/sampler top_p=0.5", "top_p=0.5 is not allowed (sampler greedy): greedy has no top_p"),
        ("/sampler max_new_tokens", "unknown sampler 'max_new_tokens'"),
        ("/sampler greedy temperature", "no value in 'temperature' (/sampler): write setting=value"),
        ("/sampler max_new_tokens=[", "not a value: '[' (/sampler max_new_tokens): "),
        ("/seed 99999999999999999999", "the seed 99999999999999999999 is out of range (/seed): "),
        ("/sampler ../adapter/qlora", "unknown sampler '../adapter/qlora' (sampler): "),
        ("/seed one", "not a whole number: 'one' (/seed): "),
        ("/system Be brief.", "a system message needs a model trained on conversations (system): "),
        ("word " * 600, "tokens with its template and the model's context is 512 (message): shorten it"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_one_line_and_the_conversation_goes_on(
    tuned: Any, capsys: pytest.CaptureFixture[str], line: str, error: str
) -> None:
    terminal, code = talk(tuned, line)
    err = capsys.readouterr().err
    assert code == 0
    assert terminal.turns == []
    assert err.startswith("error: ")
    assert error in err
    assert err.count("\n") == 1


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_with_130(
    base: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Callable[[Terminal, str], None] = Terminal._write
    shown: list[str] = []

    def interrupted(self: Terminal, text: str) -> None:
        write(self, text)
        shown.append(text)
        if len(shown) == 5:  # two lines of welcome, three pieces
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "_write", interrupted)
    terminal, code = talk(base, "Hello", KeyboardInterrupt())
    assert code == 130
    assert terminal.turns[1]["content"] == "".join(shown[2:5])
    assert "[stopped; seed 5]" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_shown_instead(capsys: pytest.CaptureFixture[str], base: Any) -> None:
    sampler = named_sampler("greedy", {"begins_with": "a\x1b[2Jb", "max_new_tokens": 12})
    coming = iter(["Hello"])

    def read(_: str) -> str:
        try:
            return next(coming)
        except StopIteration:
            raise EOFError from None

    terminal = Terminal(Dialogue(base), sampler=sampler, seed=0, read=read)
    assert terminal.run() == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a␛[2Jb" in out
    assert terminal.turns[1]["content"].startswith("a\x1b[2Jb")
