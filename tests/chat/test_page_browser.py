"""The chat page in a real browser, where one is installed: type, watch it come, stop, switch the adapter, look for leaks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import CHROMIUM, Browser
from .conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
TOKEN = "hf_" + "q7" * 12
STATUS = "document.querySelector('#status textarea').value"
ANSWERS = "[...document.querySelectorAll('#chat .bot.message')].map(e => e.innerText)"
ASKED = "[...document.querySelectorAll('#chat .user.message')].map(e => e.innerText)"


@pytest.fixture
def served(adapters: dict[str, Path], tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The script as a person starts it, in an empty directory, with a token in the environment; its address."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path / "empty"
    folder.mkdir()
    command = [
        sys.executable, str(ROOT / "scripts" / "chat.py"), str(adapters["one"]), "--adapter", f"two={adapters['two']}",
        "--web", "--port", "0", "--sampler", "top_p_temperature", "--max-new-tokens", "24", "--accelerator", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "HF_TOKEN": TOKEN, "GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_SHARE": "True"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.match(r"chat: (http://127\.0\.0\.1:\d+) \(on this machine only", line)
        if found is None:
            process.kill()
            pytest.fail(f"{line}{process.communicate()[1]}")
        yield found[1], process
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted"
        assert TOKEN not in out + err
        assert "Traceback" not in err
        assert list(folder.iterdir()) == [], "it leaves nothing behind"
    finally:
        process.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path)
    yield opened
    opened.close()


def test_type_stream_stop_and_switch(
    served: tuple[str, subprocess.Popen[str]], browser: Browser, tmp_path: Path
) -> None:
    address, _ = served
    browser.open(address)
    browser.until("!!document.querySelector('#message textarea')")
    assert "Trained on single instructions" in browser.until("document.querySelector('#about')?.innerText")

    browser.type("#message textarea", "Count the words.", enter=True)
    grown: list[str] = []
    while "seed 0: 24 tokens" not in browser.value(STATUS):
        if (now := browser.value(ANSWERS)) and now[-1] not in grown[-1:]:
            grown.append(now[-1])
    assert len(grown) > 2, "it comes in pieces"
    first = browser.until(ANSWERS)[0]
    assert browser.value(ASKED)[0].strip() == "Count the words."
    assert browser.value("document.querySelector('#message textarea').value") == ""
    assert browser.value("document.querySelector('#seed input').value") == "1"

    browser.click("#again")
    browser.until(STATUS, wanted=lambda text: "default, top_p_temperature, seed 1" in text)
    second = browser.value(ANSWERS)
    assert len(second) == 1
    assert second[0] != first, "another seed"

    for name, seed in (("base", 2), ("two", 3)):
        browser.click(f"#adapter input[value={name}]")
        browser.until(f"document.querySelector('#adapter input[value={name}]').checked")
        browser.click("#again")
        browser.until(
            STATUS, wanted=lambda text, told=f"{name}, top_p_temperature, seed {seed}": told in text
        )
    assert "The whole conversation is sent" in browser.value("document.querySelector('#about').innerText")
    assert browser.value("!!document.querySelector('#system textarea')"), "it can have a system message"

    # A long answer, stopped.
    browser.value(
        "(e => { e.value = 450; e.dispatchEvent(new Event('input', {bubbles: true}));"
        " e.dispatchEvent(new Event('change', {bubbles: true})); })(document.querySelector('#max_new_tokens input[type=number]'))"
    )
    browser.type("#message textarea", "And now a long one", enter=True)
    browser.until("!document.querySelector('#stop').disabled")
    browser.until(f"{ANSWERS}.length == 2")
    browser.click("#stop")
    browser.until(STATUS, wanted=lambda text: text.endswith("stopped") or "tokens" in text)
    assert browser.value(STATUS) == "two, top_p_temperature, seed 4: stopped"

    # What cannot be answered is said, and the message stays to be mended.
    browser.type("#message textarea", "word " * 600, enter=True)
    browser.until(STATUS, wanted=lambda text: "context is 512 (message): shorten it" in text)
    assert browser.value("document.querySelector('#message textarea').value").startswith("word word")
    assert len(browser.value(ASKED)) == 2

    browser.click("#clear")
    browser.until(f"{ANSWERS}.length == 0")
    assert browser.console == []
    outside = [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))]
    assert outside == []
    page = browser.value("document.documentElement.outerHTML") + str(browser.value(
        f"fetch('{address}/config').then(r => r.text())"
    ))  # fmt: skip
    assert TOKEN not in page
    assert '"analytics_enabled":false' in page.replace(" ", "")
