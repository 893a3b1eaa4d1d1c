"""The page's settings and what can go wrong before it is there; the page itself is in test_page_browser.py."""

from __future__ import annotations

import importlib.util
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmlab.chat.dialogue import Dialogue
from lmlab.chat.page import HOST, OFF, SLIDERS, _Page, build_page, free_port, launch
from lmlab.config.named import named_sampler, sampler_names
from lmlab.records import UserError

from .conftest import BASE


@pytest.mark.parametrize("kind", sampler_names())
def test_untouched_sliders_are_the_sampler_as_it_is(base: Any, kind: str) -> None:
    own = {"max_new_tokens": 2000, "stop": ["\n"], "repetition_penalty": 0.3}
    page = _Page(Dialogue(base), "x", named_sampler("greedy", own))
    looks = page._looks(kind)
    assert [look["visible"] for look in looks] == [
        field in named_sampler(kind).model_dump() for field in SLIDERS
    ]
    assert all(look["minimum"] <= look["value"] <= look["maximum"] for look in looks)
    chosen = page._chosen(kind, tuple(look["value"] for look in looks))
    assert chosen == named_sampler(kind, own), "what all have is the run's own, beyond the sliders' ends"


def test_a_moved_slider_counts_and_at_its_end_a_setting_is_off_again(base: Any) -> None:
    page = _Page(Dialogue(base), "x", named_sampler("combined"))
    values = {field: look["value"] for field, look in zip(SLIDERS, page._looks("combined"), strict=True)}
    assert (values["min_p"], values["typical_p"]) == (OFF["min_p"], OFF["typical_p"]), "null in the file"
    moved = {**values, "min_p": 0.2, "top_k": 7.0, "max_new_tokens": 12.0}
    chosen = page._chosen("combined", tuple(moved.values()))
    assert chosen == named_sampler("combined", {"min_p": 0.2, "top_k": 7, "max_new_tokens": 12})
    off = {**values, "top_k": 0, "top_p": 1.0}
    assert page._chosen("combined", tuple(off.values())) == named_sampler(
        "combined", {"top_k": None, "top_p": None}
    )
    with pytest.raises(UserError, match="top_k=0 is not allowed"):
        page._chosen("top_k", tuple({**values, "top_k": 0}.values()))


def test_without_gradio_the_extra_is_named_before_anything_is_loaded(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a)
    )
    assert script("chat").main(["nowhere/at-all", "--web"]) == 2
    assert capsys.readouterr().err == "error: the page needs gradio (--web): pip install 'lmlab[chat]'\n"


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert script("chat").main(["nowhere/at-all", "--web", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: port {port} cannot be used: Address already in use (--port): ")
    assert free_port(0) > 0
    with pytest.raises(UserError, match="70000 is no port"):
        free_port(70_000)


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (["--seed", str(2**63)], f"the seed {2**63} is out of range (--seed): "),
        (["--sampler", "gredy"], "unknown sampler 'gredy'"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is not allowed"),
        (["--adapter", "base=x"], "the name 'base' is taken (--adapter): "),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], told: list[str], error: str
) -> None:
    assert script("chat").main(["nowhere/at-all", *told]) == 2
    err = capsys.readouterr().err
    assert error in err
    assert err.count("\n") == 1


def test_wrong_choices_for_a_model(
    script: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tuned: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lmlab.load

    monkeypatch.setattr(lmlab.load, "load_for_use", lambda name, **options: tuned)
    for told, error in (
        (["--use", "three"], "no adapter 'three' (adapter): "),
        (["--system", "Be brief."], "a system message needs a model trained on conversations (system): "),
    ):
        assert script("chat").main([str(BASE), *told]) == 2
        assert error in capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_opens_no_folder(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    secret = tmp_path / "secret.txt"
    secret.write_text("x", encoding="utf-8")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", str(tmp_path))
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/elsewhere")
    page, port = build_page(Dialogue(base), name="x", sampler=named_sampler("greedy"), seed=0), free_port(0)
    try:
        launch(page, port)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{HOST}:{port}/gradio_api/file={secret}", timeout=30)
        assert caught.value.code == 403
        assert page.root_path == ""
    finally:
        page.close(verbose=False)
