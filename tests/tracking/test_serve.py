"""The served list of runs, by real requests: what is served, what is not, and to whom."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html import unescape
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from lmlab.records import UserError
from lmlab.tracking import serve
from lmlab.tracking.results import write_results
from lmlab.tracking.serve import HOST, KINDS, Server

from .pages import Page, assert_only_our_script, small_run, write_json

SECRET = "not for anybody"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run and a sweep, among files that are nobody's business."""
    root = tmp_path / "outputs"
    run = small_run(root / "sft" / "good")
    (run / "report.html").write_text("the run's own page", encoding="utf-8")
    small_run(root / "sweeps" / "s" / "0-adapter=none")
    (tmp_path / "secret.json").write_text(SECRET, encoding="utf-8")
    (root / ".env").write_text(SECRET, encoding="utf-8")
    (root / ".hidden.json").write_text(SECRET, encoding="utf-8")
    (run / "weights.safetensors").write_text(SECRET, encoding="utf-8")
    (run / "script.py").write_text(SECRET, encoding="utf-8")
    (root / ".git").mkdir()
    (root / ".git" / "a.json").write_text(SECRET, encoding="utf-8")
    os.symlink(tmp_path / "secret.json", run / "out.json")
    os.symlink(run / "weights.safetensors", run / "weights.json")
    os.symlink(root / ".git" / "a.json", run / "hidden.json")
    os.mkfifo(run / "pipe.log")
    os.symlink(tmp_path, root / "up")
    return root


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    with Server(root, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server, path: str, *, method: str = "GET", host: str | None = HOST, **headers: str
) -> tuple[HTTPResponse, str]:
    """One request as it is written, with the path and the Host of a stranger if need be."""
    with contextlib.closing(HTTPConnection(HOST, server.server_address[1], timeout=30)) as line:
        line.putrequest(method, path, skip_host=True)
        for name, value in (({"Host": host} if host is not None else {}) | headers).items():
            line.putheader(name, value)
        line.endheaders()
        answer = line.getresponse()
        return answer, answer.read().decode("utf-8")


def test_the_list_is_made_anew_at_each_load(server: Server, root: Path) -> None:
    for path in ("/", "/index.html", "/?x=1"):
        answer, html = ask(server, path)
        assert answer.status == 200
        assert_only_our_script(html, live=True)
        assert "2 runs: 2 finished; 1 sweep." in Page(html).words
    before = sorted(root.rglob("*"))
    small_run(root / "sft" / "more")
    assert "3 runs: 3 finished" in ask(server, "/")[1]
    assert [path for path in root.rglob("*") if path not in before and "more" not in path.parts] == [], (
        "it only reads"
    )


def test_an_unchanged_list_is_not_sent_again(server: Server, root: Path) -> None:
    tag = ask(server, "/")[0].headers["ETag"]
    again, body = ask(server, "/", **{"If-None-Match": tag})
    assert (again.status, body) == (304, "")
    with open(root / "sft" / "good" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 30, "val/loss": 0.5}\n')
    again, body = ask(server, "/", **{"If-None-Match": tag})
    assert again.status == 200
    assert "0.5000" in body


def test_pages_and_text_files_are_served(server: Server, root: Path) -> None:
    answer, body = ask(server, "/sft/good/metrics.jsonl")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert body == (root / "sft" / "good" / "metrics.jsonl").read_text(encoding="utf-8")
    assert answer.headers["Content-Length"] == str(len(body))
    assert ask(server, "/sft/good/summary.json")[0].headers["Content-Type"] == "application/json"
    head, nothing = ask(server, "/sft/good/metrics.jsonl", method="HEAD")
    assert (head.status, head.headers["Content-Length"], nothing) == (200, str(len(body)), "")
    assert "0-adapter=none" in ask(server, "/sweeps/s/0-adapter%3Dnone/config.yaml")[1]


@pytest.mark.usefixtures("undrawn")
def test_a_page_older_than_its_run_is_made_now(server: Server, root: Path) -> None:
    run = root / "sft" / "good"
    later = (run / "metrics.jsonl").stat().st_mtime + 60
    os.utime(run / "report.html", (later, later))
    assert ask(server, "/sft/good/report.html")[1] == "the run's own page"
    os.utime(run / "metrics.jsonl", (later + 60, later + 60))
    assert "✓ finished" in Page(ask(server, "/sft/good/report.html")[1]).words
    assert (run / "report.html").read_text(encoding="utf-8") == "the run's own page", "and nothing is written"
    assert "1 finished" in Page(ask(server, "/sweeps/s/report.html")[1]).words, "of a sweep too"
    job = root / "sweeps" / "s" / "0-adapter=none"
    assert "✓ finished" in Page(ask(server, "/sweeps/s/0-adapter=none/report.html")[1]).words
    assert not (job / "report.html").exists()
    write_results(
        root / "sweeps" / "s", [{"job": 1, "overrides": "a", "status": "refused: no", "directory": ""}]
    )
    assert "1 refused" in Page(ask(server, "/sweeps/s/report.html")[1]).words


@pytest.mark.parametrize(
    "path",
    ["/../secret.json", "/sft/../../secret.json", "/..%2fsecret.json", "/%2e%2e/secret.json", "/sft/%2e%2e/%2e%2e/secret.json",
     "//secret.json", "/sft//good/summary.json", "/up/secret.json", "/sft/good/out.json", "/sft/good/weights.json",
     "/sft/good/hidden.json", "/sft/good/pipe.log",
     "/sft/good/weights.safetensors", "/sft/good/script.py", "/.env", "/.hidden.json", "/.git/a.json", "/sft/good/.lock",
     "/sft", "/sft/good", "/sft/good/", "/sft/good/nothing.json", "/sft/good/summary.json%00.html", "/sft%5c..%5csecret.json",
     "/c:/secret.json", "secret.json", "http://127.0.0.1/sft/good/summary.json", "*", "/sft/good/..;/summary.json", "/" + "a" * 5000 + ".json"],
)  # fmt: skip
def test_nothing_else_is_there(server: Server, path: str) -> None:
    answer, body = ask(server, path)
    assert answer.status == 404
    assert SECRET not in body


def test_no_other_folder_however_it_is_asked_for(server: Server, tmp_path: Path) -> None:
    assert ask(server, f"/{tmp_path}/secret.json")[0].status == 404
    assert ask(server, str(tmp_path / "secret.json"))[0].status == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", None,
                                  "127.0.0.1:80:80", "127.0.0.1:x", "192.168.1.1", "0.0.0.0", "user@127.0.0.1"])  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/sft/good/summary.json"])
def test_a_name_pointed_at_this_machine_is_refused(server: Server, host: str | None, path: str) -> None:
    answer, body = ask(server, path, host=host)
    assert answer.status == 421
    assert "finished" not in body


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:9000", "127.0.0.1:9000"])
def test_this_machine_is_answered_by_any_port(server: Server, host: str) -> None:
    assert ask(server, "/", host=host)[0].status == 200, "an ssh tunnel has a port of its own"


def test_two_hosts_are_none(server: Server) -> None:
    with socket.create_connection((HOST, server.server_address[1]), timeout=30) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert line.makefile("rb").readline().split()[1] == b"421"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(server: Server, root: Path, method: str) -> None:
    answer, _ = ask(server, "/sft/good/summary.json", method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert (root / "sft" / "good" / "summary.json").exists()


@pytest.mark.parametrize("path", ["/", "/sft/good/summary.json", "/nothing"])
def test_no_other_site_may_use_the_answers(server: Server, path: str) -> None:
    headers = ask(server, path, Origin="https://evil.example")[0].headers
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy


def test_no_script_runs_but_that_of_our_pages(server: Server, root: Path) -> None:
    (root / "sft" / "good" / "theirs.html").write_text("<script>fetch('/')</script>", encoding="utf-8")
    ours = re.search(r"script-src ('sha256-[^']+')", unescape(ask(server, "/")[1]))
    assert ours is not None
    for path in ("/", "/sft/good/theirs.html"):
        told = ask(server, path)[0].headers["Content-Security-Policy"].split("; ")
        assert [part for part in told if part.startswith("script-src")] == [f"script-src {ours[1]}"]


def test_a_file_that_shrinks_while_it_is_sent_holds_nobody(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = serve._Part.read

    def cut(part: serve._Part, amount: int) -> bytes:
        os.truncate(root / "sft" / "good" / "console.log", 3)
        return read(part, amount)

    monkeypatch.setattr(serve._Part, "read", cut)
    (root / "sft" / "good" / "console.log").write_bytes(b"x" * 10)
    with socket.create_connection((HOST, server.server_address[1]), timeout=20) as line:
        line.sendall(b"GET /sft/good/console.log HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert line.makefile("rb").read().endswith(b"\r\n\r\nxxx"), "and then the line is closed"


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.socket.getsockname()[0] == server.server_address[0] == "127.0.0.1"
    assert ".py" not in KINDS


def test_a_port_that_is_taken_is_one_line(server: Server, root: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(
        UserError, match=rf"port {port} cannot be used: .* \(--port\): choose another one, or 0"
    ):
        Server(root, port)
    with pytest.raises(UserError, match="no such directory"):
        Server(root / "nowhere", 0)


def test_one_that_stops_halfway_does_not_hold_the_others(server: Server) -> None:
    with socket.create_connection((HOST, server.server_address[1])) as line:
        line.sendall(b"GET / HT")
        assert ask(server, "/")[0].status == 200


def test_one_that_breaks_off_leaves_the_terminal_alone(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection((HOST, server.server_address[1])) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT")
        line.recv(1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no goodbye
    deadline = time.monotonic() + 20
    while any("process_request" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert capsys.readouterr().err == ""


def test_a_broken_run_is_a_row_here_too(server: Server, root: Path) -> None:
    write_json(root / "sft" / "good" / "summary.json", [1])
    (root / "sft" / "half").mkdir()
    (root / "sft" / "half" / ".lock").write_text("{", encoding="utf-8")
    html = ask(server, "/")[1]
    assert "summary.json is broken" in html
    assert ">half<" in html, "no link, as no page can be made of it"


def test_the_script_serves_until_it_is_interrupted(root: Path) -> None:
    told = [sys.executable, str(ROOT / "scripts" / "report.py"), str(root), "--serve", "--port", "0"]
    with subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("runs: http://127.0.0.1:")
        assert line.endswith("/ (on this machine only; Ctrl-C ends)\n")
        port = int(line.split("/")[2].partition(":")[2])
        with contextlib.closing(HTTPConnection(HOST, port, timeout=30)) as connection:
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
        process.send_signal(2)
        assert process.wait(timeout=30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "\nended\n"
