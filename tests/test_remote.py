"""Files at a URL: copies that are loaded once, go on after a kill and are checked; retries that end; no credentials."""

from __future__ import annotations

import hashlib
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from lmlab import remote
from lmlab.data.files import find_files
from lmlab.records import UserError
from lmlab.remote import Remote, copy_of, fetch, fetch_below, is_url, without_file_scheme

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class FlakyFileSystem(MemoryFileSystem):
    """A storage that counts the bytes it serves and fails as often as it is told to."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    failures = served = calls = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **told: Any) -> bytes:
        kind = type(self)
        kind.calls += 1
        if kind.failures:
            kind.failures -= 1
            raise ConnectionResetError("Connection reset by peer")
        found = super().cat_file(path, start=start, end=end, **told)
        kind.served += len(found)
        return found


@pytest.fixture(autouse=True)
def _storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    monkeypatch.setenv("LMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FlakyFileSystem, "store", {})
    monkeypatch.setattr(FlakyFileSystem, "pseudo_dirs", [""])
    for name in ("failures", "served", "calls"):
        monkeypatch.setattr(FlakyFileSystem, name, 0)
    fsspec.filesystem("flaky").pipe_file("/data/a.bin", CONTENT)
    yield
    FlakyFileSystem.clear_instance_cache()


SOURCE = "flaky://data/a.bin"


def test_what_is_a_url() -> None:
    assert all(is_url(url) for url in ("s3://bucket/x", "memory://x", "https://host/x", "S3://bucket/x"))
    assert not any(is_url(path) for path in ("x.jsonl", "/a/b", "file:///a/b", "C:/x", Path("s3:/x")))
    assert without_file_scheme("file:///a/b") == "/a/b"


def test_a_checked_copy_is_loaded_once(tmp_path: Path) -> None:
    target = fetch(Remote(SOURCE), tmp_path / "a.bin", sha256=SHA256)
    assert target.read_bytes() == CONTENT
    fsspec.filesystem("flaky").rm("/data/a.bin")
    assert fetch(Remote(SOURCE), target, sha256=SHA256) == target
    assert FlakyFileSystem.served == len(CONTENT)
    target.write_bytes(b"damaged")
    with pytest.raises(UserError, match="no such file"):
        fetch(Remote(SOURCE), target, sha256=SHA256)


def test_several_at_once_load_it_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(fetch, Remote(SOURCE), tmp_path / "a.bin") for _ in range(8)]
        assert {each.result().read_bytes() for each in made} == {CONTENT}
    assert FlakyFileSystem.served == len(CONTENT)


def test_a_changed_file_is_loaded_again(tmp_path: Path) -> None:
    fetch(Remote(SOURCE), tmp_path / "a.bin")
    fsspec.filesystem("flaky").pipe_file("/data/a.bin", b"new")
    assert fetch(Remote(SOURCE), tmp_path / "a.bin").read_bytes() == b"new"


def test_a_file_that_changes_while_it_is_loaded_is_no_copy(tmp_path: Path) -> None:
    def change(count: int) -> None:
        fsspec.filesystem("flaky").pipe_file("/data/a.bin", CONTENT[::-1])

    with pytest.raises(
        UserError, match=r"changed while it was loaded \(flaky://data/a\.bin\): give the same"
    ):
        fetch(Remote(SOURCE), tmp_path / "a.bin", told=change)
    assert [path.name for path in tmp_path.glob("a.bin*")] == []
    assert fetch(Remote(SOURCE), tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


def test_what_is_begun_of_another_file_stays(tmp_path: Path) -> None:
    own, other = (tmp_path / f"a.bin.{name}0123456789ab.part" for name in ("", "gz."))
    for part in (own, other):
        part.write_bytes(b"begun")
    fetch(Remote(SOURCE), tmp_path / "a.bin")
    assert [path.name for path in tmp_path.glob("*.part")] == [other.name]


def test_a_copied_folder_loses_what_its_source_has_lost() -> None:
    storage = fsspec.filesystem("flaky")
    storage.pipe_file("/data/added_tokens.json", b"{}")
    folder = fetch_below(Remote("flaky://data"))
    (folder / "mine.txt").write_bytes(b"mine")
    assert (folder / "added_tokens.json").exists()
    storage.rm("/data/added_tokens.json")
    assert fetch_below(Remote("flaky://data")) == folder
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["a.bin", "mine.txt"]


def test_times_do_not_matter_where_there_is_an_etag() -> None:
    listed, asked = (
        {"size": 3, "ETag": '"x"', "LastModified": moment} for moment in ("12:00:00.5", "12:00:00")
    )
    assert remote._version(listed) == remote._version(asked)
    assert remote._version(listed) != remote._version({**listed, "ETag": '"y"'})


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_web_server_s_file_is_read_and_read_again_when_it_changes(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "rows.jsonl").write_bytes(b"one")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            place = Remote(f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl")
            (found,) = find_files(place.url)
            assert found.read_bytes() == b"one"
            (tmp_path / "rows.jsonl").write_bytes(b"two")
            os.utime(tmp_path / "rows.jsonl", (1, 1))
            assert find_files(place.url) == [found]
            assert found.read_bytes() == b"two", "it has no ETag, but a time"
            with pytest.raises(UserError, match=r"no data file at http://.*/gone\.jsonl"):
                find_files(place.url.replace("rows", "gone"))
        finally:
            server.shutdown()
            thread.join()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no copy can be made: .*/file/a\.bin\): make room, or set LMLAB_CACHE"
    ):
        fetch(Remote(SOURCE), tmp_path / "file" / "a.bin")


def test_a_vanished_network_ends_after_some_tries_and_the_next_run_goes_on(tmp_path: Path) -> None:
    def cut(count: int) -> None:
        if count == 1000:
            FlakyFileSystem.failures = 10**6

    with pytest.raises(UserError) as caught:
        fetch(Remote(SOURCE), tmp_path / "a.bin", sha256=SHA256, told=cut)
    assert str(caught.value) == (
        "the storage does not answer after 5 tries: Connection reset by peer (flaky://data/a.bin): "
        "check the network and AWS_ENDPOINT_URL, then give the same command; what is loaded stays"
    )
    assert FlakyFileSystem.calls == 1 + remote.TRIES
    assert not (tmp_path / "a.bin").exists()
    FlakyFileSystem.failures = remote.TRIES - 1
    assert fetch(Remote(SOURCE), tmp_path / "a.bin", sha256=SHA256).read_bytes() == CONTENT
    assert FlakyFileSystem.served == len(CONTENT)
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_beginning_is_loaded_anew_and_a_damaged_source_is_said(tmp_path: Path) -> None:
    about = Remote(SOURCE).about()
    assert about is not None
    part = tmp_path / f"a.bin.{remote._version(about)}.part"
    part.write_bytes(b"x" * 5000)
    assert fetch(Remote(SOURCE), tmp_path / "a.bin", sha256=SHA256).read_bytes() == CONTENT
    with pytest.raises(
        UserError, match=r"sha256 \w{12}\.\.\., its index says 000000000000.*is damaged there"
    ):
        fetch(Remote(SOURCE), tmp_path / "b.bin", sha256="0" * 64)
    assert [path.name for path in tmp_path.glob("b.bin*")] == []


def test_files_below_a_url_and_copies_with_readable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("flaky").pipe_file("/data/deep/b.bin", b"b")
    assert list(Remote("flaky://data").files()) == ["flaky://data/a.bin", "flaky://data/deep/b.bin"]
    assert list(Remote("flaky://data/*.bin").files()) == ["flaky://data/a.bin"]
    assert Remote("flaky://nowhere").files() == {}
    folder = fetch_below(Remote("flaky://data/"))
    assert folder == remote.cache_root() / "remote/flaky/data"
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["a.bin"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert copy_of("s3://bucket/x.txt") == remote.cache_root() / "remote/s3/127.0.0.1_9000/bucket/x.txt"
    for url in ("s3://bucket/../x", "s3://bucket/a//x"):
        with pytest.raises(UserError, match="in a URL"):
            copy_of(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hidden@127.0.0.1:9000")
    assert copy_of("s3://bucket/x.txt") == remote.cache_root() / "remote/s3/127.0.0.1_9000/bucket/x.txt"


@pytest.mark.parametrize("url", ["s3://key:hidden@bucket/x", "https://host/x?X-Amz-Signature=hidden"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="credentials or options in a URL") as caught:
        Remote(url)
    assert "hidden" not in str(caught.value)


def test_an_endpoint_s_password_is_not_repeated() -> None:
    def call(storage: Any, path: str) -> None:
        raise ConnectionError("no answer of http://me:hidden@127.0.0.1:9000/lab")

    with pytest.raises(UserError, match=r"no answer of http://\*\*\*@127\.0\.0\.1:9000/lab"):
        Remote(SOURCE).ask(call)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install 'lmlab\[s3\]'"):
        Remote("s3://bucket/x").read()


def test_a_storage_that_cannot_be_written_is_said() -> None:
    def call(storage: Any, path: str) -> None:
        raise NotImplementedError

    with pytest.raises(UserError, match=r"flaky:// is only read .*: use s3:// or a local path"):
        Remote(SOURCE).ask(call)


def test_an_unknown_protocol_is_said() -> None:
    with pytest.raises(UserError, match=r"use s3:// or a local path"):
        Remote("nosuch://bucket/x").read()
    pytest.importorskip("s3fs")
    with pytest.raises(UserError, match=r"no place of a storage: .*\(s3://\): use s3:// or a local path"):
        Remote("s3://").files()
