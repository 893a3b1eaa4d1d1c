"""Compose in this process, as `python train.py` would, and registries that forget what a test's plugin added."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lmlab import registry
from lmlab.config.compose import CONF, run_app, to_run_config

Compose = Callable[..., Any]
CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def composed() -> Compose:
    """``composed(*overrides, config_dir=None)`` -> Hydra's config."""

    def run(*overrides: str, config_dir: Path | None = None) -> Any:
        GlobalHydra.instance().clear()
        search = [f"hydra.searchpath=['file://{config_dir}']"] if config_dir else []
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", [*search, *overrides])

    return run


@pytest.fixture
def run_config(composed: Compose) -> Compose:
    """``run_config(*overrides, config_dir=None)`` -> the validated `RunConfig`."""
    return lambda *overrides, **options: to_run_config(composed(*overrides, **options))


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> CommandLine:
    """``command_line(*arguments, **of run_app)`` -> (exit code, stdout, stderr) of train.py up to the validated config."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        capsys.readouterr()
        code = run_app(lambda config, overrides: 0 if to_run_config(config) else 1, **options)
        assert list(folder.iterdir()) == [], "nothing may be written before the run starts"
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fresh_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is registered or imported during the test is forgotten after it."""
    import lmlab.config.schema  # noqa: F401 - everything of lmlab's own is registered

    for each in set(registry.BY_GROUP.values()):
        monkeypatch.setattr(each, "_classes", dict(each._classes))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("outside_"):
            del sys.modules[name]
