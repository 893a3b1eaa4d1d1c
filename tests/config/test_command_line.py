"""Hydra's flags and settings in any order, as people type them."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout

import pytest
from omegaconf import OmegaConf

from lmlab.config.command_line import read_command_line
from lmlab.config.compose import run_app
from lmlab.records import UserError


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["a=1", "b=2"], ["a=1", "b=2"]),
        (["a=1", "--cfg", "job", "b=2"], ["a=1", "b=2", "--cfg", "job"]),
        (
            ["-m", "seed=1,2", "--config-dir", "seed", "a=1"],
            ["seed=1,2", "a=1", "-m", "--config-dir", "seed"],
        ),
        (["a=1", "-p", "data", "a=1", "-c", "job"], ["a=1", "a=1", "-p", "data", "-c", "job"]),
        (["a=1", "--info"], ["a=1", "--info"]),
        (["a=1", "--info", "config", "b=2"], ["a=1", "b=2", "--info", "config"]),
        (["--cfg", "job"], ["--cfg", "job"]),
    ],
)
def test_settings_come_before_the_flags(given: list[str], ordered: list[str]) -> None:
    flags, arguments = read_command_line(given)
    assert arguments == ordered
    assert flags.overrides == [text for text in given if "=" in text]
    assert read_command_line(ordered)[1] == ordered


def test_a_path_with_an_equals_sign_is_put_in_quotes() -> None:
    """As the names are that runs are given where they have none, and as they are printed at a run's end."""
    path = "outputs/pretrain/experiment=small_text-path=tinyshakespeare.txt-96ab6d"
    flags, arguments = read_command_line(["--cfg", "job", f"+model.name_or_path={path}", f"a.b='{path}'"])
    assert flags.overrides == [f"+model.name_or_path='{path}'", f"a.b='{path}'"]
    assert arguments == [*flags.overrides, "--cfg", "job"]
    for text in ("optim.lr==3", "a=b=[1", "a=b=c,d", "a={b=c}"):
        with pytest.raises(UserError, match="cannot read"):
            read_command_line([text])


def test_settings_on_both_sides_of_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "adapter=qlora", "--cfg", "job", "trainer.max_steps=3"])
    with redirect_stdout(io.StringIO()) as printed:
        assert run_app(lambda composed, overrides: 1) == 0
    shown = OmegaConf.create(printed.getvalue())
    assert (shown.adapter.kind, shown.trainer.max_steps) == ("qlora", 3)
