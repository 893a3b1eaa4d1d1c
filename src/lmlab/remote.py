"""Files at a URL that fsspec knows (``s3://bucket/key``, ``memory://``, ``https://``), and their copies on this machine.

Credentials and endpoint are the storage's own business: its library reads them from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_PROFILE, ...), and a URL that carries one is refused, since configs and
logs would carry it on. Every request is tried a bounded number of times here, and the libraries' own retries are off:
three layers of them would multiply to an hour of silence.

A copy (`fetch`) is read by ranges into ``NAME.VERSION.part``, which goes on after a kill, and appears by one rename under a
lock, so that any number of processes of a machine load it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lmlab.records import UserError

T = TypeVar("T")

TRIES = 5
PAUSE = 0.5
"""Seconds before the second try; twice as long before each further one."""
CONNECT_SECONDS, READ_SECONDS = 10, 60
RANGE_BYTES = 8 * 2**20
"""Of one request; what a download holds in memory."""
EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Protocol -> extra of lmlab that brings it."""


def cache_root() -> Path:
    """The folder of everything that can be made again: LMLAB_CACHE, or ``~/.cache/lmlab``."""
    return Path(os.environ.get("LMLAB_CACHE") or Path.home() / ".cache" / "lmlab").expanduser().absolute()


def is_url(place: str | Path) -> bool:
    """Whether it is elsewhere; ``file://`` is not, see `without_file_scheme`."""
    return isinstance(place, str) and bool(re.match(r"(?!file:)[a-zA-Z][a-zA-Z0-9+.-]+://", place))


def without_file_scheme(place: str) -> str:
    """``file:///a/b`` as the path that it means; anything else as it is."""
    return place.removeprefix("file://")


@dataclass(frozen=True)
class Remote:
    """What lies at a URL, a file or the files below it.

    Every method raises `UserError` where the storage does not answer after some tries, refuses, or lacks its library.
    """

    url: str

    def __post_init__(self) -> None:
        refuse_credentials(self.url)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def _is_s3(self) -> bool:
        return self.url.partition(":")[0] in EXTRAS

    def ask(self, call: Callable[[Any, str], T]) -> T:
        """``call(file system, path in it)``, tried again while the storage does not answer.

        Raises:
            FileNotFoundError: as the call does; only the caller knows what that means.
        """
        pause = PAUSE
        for number in range(1, TRIES + 1):
            try:
                return call(*_connected(self.url))
            except FileNotFoundError:
                raise
            except Exception as error:
                self._refuse(error, last=number == TRIES)
            time.sleep(pause)
            pause *= 2
        raise AssertionError

    def _refuse(self, error: Exception, *, last: bool) -> None:
        """Raise what more tries cannot mend; on the last one also what they might have."""
        name, said = type(error).__name__, _without_keys(str(error)) or type(error).__name__
        protocol = self.url.partition(":")[0]
        if isinstance(error, ImportError):
            extra = EXTRAS.get(protocol)
            fix = f"pip install 'lmlab[{extra}]'" if extra else "install the library that fsspec names"
            raise UserError(f"cannot read {protocol}://: {said}", where=self.url, fix=fix) from error
        if isinstance(error, PermissionError) or "Credentials" in name or "Token" in name:
            fix = (
                "put the credentials into the environment or .env (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
            raise UserError(f"no access: {said}", where=self.url, fix=fix) from error
        if isinstance(error, ValueError):
            what = f"no such kind of URL: {said}" if "rotocol" in said else f"no place of a storage: {said}"
            raise UserError(what, where=self.url, fix="use s3:// or a local path") from error
        if isinstance(error, NotImplementedError):
            what = f"{protocol}:// is only read"
            raise UserError(what, where=self.url, fix="use s3:// or a local path") from error
        known = isinstance(error, OSError | TimeoutError)
        if not known and type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise error
        if last:
            what = f"the storage does not answer after {TRIES} tries: {said}"
            fix = "check the network and AWS_ENDPOINT_URL, then give the same command; what is loaded stays"
            raise UserError(what, where=self.url, fix=fix) from error

    def about(self) -> dict[str, Any] | None:
        """fsspec's facts of the file (``size`` and a version); None where there is none."""
        try:
            found = self.ask(lambda fs, path: (fs.invalidate_cache(), fs.info(path))[1])
        except FileNotFoundError:
            return None
        return found if found["type"] == "file" else None

    def read(self) -> bytes | None:
        """The whole content of a small file; None where there is none."""
        try:
            return self.ask(lambda fs, path: fs.cat_file(path))
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        """Replace the file as a whole."""
        self._send(lambda fs, path: fs.pipe_file(path, content))

    def put(self, file: Path) -> None:
        """Replace the file by a local one."""
        parts = {"chunksize": RANGE_BYTES * 2, "max_concurrency": 4} if self._is_s3 else {}
        self._send(lambda fs, path: fs.put_file(str(file), path, **parts))

    def _send(self, call: Callable[[Any, str], object]) -> None:
        try:
            self.ask(call)
        except FileNotFoundError as error:
            what = f"nowhere to write to: {error}"
            raise UserError(
                what, where=self.url, fix="make the bucket first, or check AWS_ENDPOINT_URL"
            ) from error

    def remove(self) -> None:
        """Remove the file, or all files below, if there are any."""
        with contextlib.suppress(FileNotFoundError):
            self.ask(lambda fs, path: (fs.invalidate_cache(), fs.rm(path, recursive=True))[1])

    def files(self) -> dict[str, dict[str, Any]]:
        """URL -> facts of the file, the files below the prefix or the matches of the glob, sorted; of https:// the file alone."""

        def look(fs: Any, path: str) -> dict[str, dict[str, Any]]:
            fs.invalidate_cache()
            if (
                "://" in path
            ):  # a web server, which has no listing: fsspec would read the file to look for links in it
                return {self.url: fs.info(path)}
            found = fs.glob(path, detail=True) if re.search(r"[*?\[]", path) else fs.find(path, detail=True)
            base = path.split("*")[0].split("?")[0].split("[")[0]
            front = self.url[: self.url.index(base, self.url.index(":") + 1) + len(base)]
            return {
                front + name[len(base) :]: about
                for name, about in sorted(found.items())
                if about["type"] == "file"
            }

        try:
            return self.ask(look)
        except FileNotFoundError:
            return {}


def refuse_credentials(url: str) -> None:
    """Refuse a URL that carries credentials or options.

    Raises:
        UserError: names the URL without them.
    """
    host = url.partition("://")[2].partition("/")[0]
    if "@" in host or re.search(r"\?.*=", url):
        place = re.sub(r"://[^/]*@", "://***@", url.partition("?")[0])
        fix = "leave them out and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        raise UserError("credentials or options in a URL", where=place, fix=fix)


def _connected(url: str) -> tuple[Any, str]:
    """fsspec's file system, made once for a process, and the path in it."""
    from fsspec.core import url_to_fs

    if url.partition(":")[0] not in EXTRAS:
        return url_to_fs(url)
    config = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
    }
    fs, path = url_to_fs(url, config_kwargs=config)
    fs.retries = 1
    return fs, path


def _without_keys(text: str) -> str:
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text


# --- copies on this machine -----------------------------------------------------------------------------------------


def copy_of(url: str) -> Path:
    """Where the copy of a URL lies: readable, as error messages name it."""
    protocol, _, rest = url.partition("://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    server = endpoint.partition("://")[2].rpartition("@")[2]
    host = re.sub(r"[^\w.-]+", "_", server) if protocol in EXTRAS else ""
    parts = rest.strip("/").split("/")
    if not {"", ".", ".."}.isdisjoint(parts):  # two keys could have one copy
        raise UserError("a '.', '..' or '//' in a URL", where=url, fix="name the files without it")
    return Path(cache_root(), "remote", protocol, host, *parts)


def fetch(
    source: Remote,
    target: Path,
    *,
    sha256: str | None = None,
    about: dict[str, Any] | None = None,
    told: Callable[[int], object] = lambda count: None,
) -> Path:
    """The file as ``target`` on this machine: loaded now, or there already.

    Args:
        sha256: of its content. A copy that was checked against it is taken without asking the storage again; without
            it the copy counts as long as size and version at the source are those it was made from.
        about: facts of the source, if the caller has them.
        told: called with the bytes loaded, now and again.

    Raises:
        UserError: nothing there, not what ``sha256`` says, no room or right to write ``target``, or as `Remote`.
    """
    with _locked(target):
        if sha256 and _noted(target).get("sha256") == sha256:
            return target
        about = about or source.about()
        if about is None:
            raise UserError("no such file", where=str(source), fix="check the URL and AWS_ENDPOINT_URL")
        version = _version(about)
        if sha256 is None and _noted(target).get("version") == version:
            return target
        part = target.with_name(f"{target.name}.{version}.part")
        for old in target.parent.glob(f"{_escaped(target.name)}.{'[0-9a-f]' * 12}.part"):
            if old != part:
                old.unlink()
        was_begun = part.exists()
        watched = sha256 is None and (was_begun or (about["size"] or 0) > RANGE_BYTES)
        before = source.about() if watched else None  # a listing may tell the facts in other words
        found = _load(source, part, about["size"], told)
        if sha256 not in (None, found) and was_begun:  # what lay there may be at fault
            part.unlink()
            found = _load(source, part, about["size"], told)
        if watched and source.about() != before:  # ranges of two versions are none
            part.unlink()
            what = "changed while it was loaded"
            raise UserError(what, where=str(source), fix="give the same command again")
        if sha256 not in (None, found):
            part.unlink()
            what = f"sha256 {found[:12]}..., its index says {str(sha256)[:12]}..."
            raise UserError(what, where=str(source), fix="it is damaged there: make or copy it again")
        part.replace(target)
        stat = target.stat()
        note = {"sha256": found, "version": version, "size": stat.st_size, "mtime": stat.st_mtime_ns}
        _note_file(target).write_text(json.dumps(note), encoding="utf-8")
    return target


def fetch_below(source: Remote, folder: Path | None = None) -> Path:
    """The folder with copies of the few files directly below a URL, a tokenizer's say, or the copy of the one file that it is.

    Raises:
        UserError: nothing there, or as `fetch`.
    """
    folder = folder or copy_of(source.url)
    files = source.files()
    if not files:
        raise UserError("nothing there", where=str(source), fix="check the URL and AWS_ENDPOINT_URL")
    if list(files) == [source.url.rstrip("/")]:
        return fetch(source, folder, about=files[source.url.rstrip("/")])
    names = {}
    for url, about in files.items():
        if Remote(url).url == f"{source.url.rstrip('/')}/{Remote(url).name}":
            names[Remote(url).name] = about
    for name, about in names.items():
        fetch(source / name, folder / name, about=about)
    for note in folder.glob(".*.copy"):  # of a file that is gone there: a tokenizer made anew may have fewer
        if (name := note.name[1 : -len(".copy")]) not in names:
            (folder / name).unlink(missing_ok=True)
            note.unlink(missing_ok=True)
    return folder


def missing_bytes(target: Path, sha256: str, size: int) -> int:
    """How much of a file is still to be loaded, ``size`` or nothing."""
    return 0 if _noted(target).get("sha256") == sha256 else size


def _load(source: Remote, part: Path, size: int | None, told: Callable[[int], object]) -> str:
    """Complete the file by ranges; the sha256 of the whole."""
    if size is None:
        raise UserError("the server does not say its size", where=str(source), fix="load it by hand")
    digest = hashlib.sha256()
    with part.open("a+b") as file:
        file.seek(0)
        while piece := file.read(RANGE_BYTES):
            digest.update(piece)
        if file.tell() > size:
            file.truncate(0)
            digest = hashlib.sha256()
        while (start := file.tell()) < size:
            end = min(start + RANGE_BYTES, size)
            try:
                piece = source.ask(lambda fs, path: fs.cat_file(path, start=start, end=end))  # noqa: B023
            except FileNotFoundError as error:
                what = "gone while it was loaded"
                raise UserError(what, where=str(source), fix="give the same command again") from error
            if len(piece) != end - start:
                what = f"asked for {end - start:,} bytes, got {len(piece):,}"
                raise UserError(what, where=str(source), fix="load it by hand: no ranges are served")
            file.write(piece)
            digest.update(piece)
            told(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _version(about: dict[str, Any]) -> str:
    # An ETag says it all; times are told more or less finely by a listing than by the file's own facts.
    tag = about.get("ETag") or about.get("etag")
    times = ("LastModified", "Last-Modified", "created", "mtime")
    told = [about.get("size"), tag, *([] if tag else [about.get(name) for name in times])]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _note_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.copy")


def _noted(target: Path) -> dict[str, Any]:
    """What was noted of the copy, if that is what lies there."""
    try:
        note = json.loads(_note_file(target).read_text(encoding="utf-8"))
        stat = target.stat()
    except (OSError, ValueError):
        return {}
    return note if (note["size"], note["mtime"]) == (stat.st_size, stat.st_mtime_ns) else {}


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except InterruptedError:  # by the caller
        raise
    except OSError as error:
        what = f"no copy can be made: {error.strerror or error}"
        raise UserError(
            what, where=str(target), fix="make room, or set LMLAB_CACHE to another disk"
        ) from error
