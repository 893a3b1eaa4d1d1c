"""Where a corpus is written: a folder, or the files below a URL (``s3://bucket/prefix``). One interface for both.

What is written appears whole or not at all: in a folder by a rename, at a URL because an upload does. Shards for a URL are
made in a temporary folder of the machine at work and uploaded, so it needs room for the units being written only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmlab.data.readers import raw_pieces
from lmlab.records import UserError
from lmlab.remote import Remote, copy_of, is_url, without_file_scheme

RANGE_BYTES = 8 * 2**20
_STAGED = "lmlab-corpus-"
YOUNG_SECONDS = 60.0
"""A temporary folder that is not this old may be another worker's that has not locked it yet."""
AT_ONCE = 16
"""Small files read side by side."""
_LEFTOVER = re.compile(r"(?:here|probe)-[0-9a-f]{16}\.tmp|.+\.(?:[0-9a-f]{8}|[0-9]+)\.tmp")
"""Names of files that a kill leaves: probes, and what was to be renamed (here and in shards.py). Others' .tmp stay."""


class Store(Protocol):
    """Names are relative, with ``/``. Sent to workers by pickle; ``str(store)`` is what a person calls it."""

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file; {} where there is none that can be read."""
        ...

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file as a whole, durably."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file; one look at all of them."""
        ...

    def read_many(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """`read` of each."""
        ...

    def sha256(self, name: str) -> str:
        """Of a file's bytes."""
        ...

    def remove(self, *names: str) -> None:
        """Files, or all files below; what is not there is no matter."""
        ...

    def is_empty(self) -> bool:
        """Whether nothing lies there yet, but perhaps what a kill has left."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """For one run alone, made if need be."""
        ...

    def staged(self) -> AbstractContextManager[Path]:
        """A folder in which files are made as they shall stand in the store; they do when it is left without an error."""
        ...

    def drop_leftovers(self) -> None:
        """Remove what a kill has left half written."""
        ...


def store_at(place: str | Path) -> Store:
    """The store that a path or URL means."""
    if isinstance(place, str) and is_url(place):
        if re.search(r"[*?\[]", place):  # removing below it would remove below all that match
            raise UserError("a corpus at a pattern", where=place, fix="name one place, without * ? [")
        return ObjectStore(Remote(place.rstrip("/")))
    return FolderStore(Path(without_file_scheme(place) if isinstance(place, str) else place))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace the file as a whole, durably."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(_text(content))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)


def _object(text: str | bytes) -> dict[str, Any]:
    content = json.loads(text)
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class FolderStore:
    """A folder of a file system."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> dict[str, Any]:
        try:
            return _object((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def write(self, name: str, content: dict[str, Any]) -> None:
        write_json(self.folder / name, content)

    def size(self, name: str) -> int | None:
        file = self.folder / name
        return file.stat().st_size if file.is_file() else None

    def sizes(self) -> dict[str, int]:
        files = (file for file in self.folder.rglob("*") if file.is_file())
        return {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files}

    def read_many(self, names: Sequence[str]) -> list[dict[str, Any]]:
        return [self.read(name) for name in names]

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in raw_pieces(self.folder / name):
            digest.update(piece)
        return digest.hexdigest()

    def remove(self, *names: str) -> None:
        for name in names:
            if (self.folder / name).is_dir():
                shutil.rmtree(self.folder / name, ignore_errors=True)
            else:
                (self.folder / name).unlink(missing_ok=True)

    def is_empty(self) -> bool:
        if not self.folder.is_dir():
            return not self.folder.exists()
        return all(_LEFTOVER.fullmatch(file.name) for file in self.folder.iterdir())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot be made: {error.strerror or error}"
            raise UserError(what, where=str(self), fix="choose another --to") from error
        with _flocked(os.open(self.folder, os.O_RDONLY), self):
            yield

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        yield self.folder  # each file is renamed by its writer

    def drop_leftovers(self) -> None:
        for file in (*self.folder.glob("*.tmp"), *self.folder.glob("*/*.tmp")):
            if _LEFTOVER.fullmatch(file.name):
                file.unlink()


@dataclass(frozen=True)
class ObjectStore:
    """The files below a URL. The lock holds on this machine only: object stores have none."""

    remote: Remote

    def __str__(self) -> str:
        return str(self.remote)

    def read(self, name: str) -> dict[str, Any]:
        try:
            return _object((self.remote / name).read() or b"{}")
        except ValueError:
            return {}

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.remote / name).write(_text(content).encode())

    def size(self, name: str) -> int | None:
        about = (self.remote / name).about()
        return None if about is None else about["size"]

    def sizes(self) -> dict[str, int]:
        start = len(self.remote.url) + 1
        return {url[start:]: about["size"] for url, about in self.remote.files().items()}

    def read_many(self, names: Sequence[str]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:  # thousands of round trips, one after another, take minutes
            return list(pool.map(self.read, names))

    def sha256(self, name: str) -> str:
        digest, file = hashlib.sha256(), self.remote / name
        for start in range(0, self.size(name) or 0, RANGE_BYTES):
            digest.update(file.ask(lambda fs, path: fs.cat_file(path, start=start, end=start + RANGE_BYTES)))  # noqa: B023
        return digest.hexdigest()

    def remove(self, *names: str) -> None:
        for name in names:
            (self.remote / name).remove()

    def is_empty(self) -> bool:
        return all(_LEFTOVER.fullmatch(Remote(url).name) for url in self.remote.files())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        lock = copy_of(self.remote.url) / ".writing.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with _flocked(os.open(lock, os.O_RDWR | os.O_CREAT), self):
            yield

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        with _temporary_folder() as folder:
            yield folder
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    (self.remote / file.relative_to(folder).as_posix()).put(file)

    def drop_leftovers(self) -> None:
        # An upload that was cut off has left nothing under its name; these are whole files of probes.
        for url in self.remote.files():
            if _LEFTOVER.fullmatch(Remote(url).name):
                Remote(url).remove()


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for a unit; those that killed workers of this machine have left, which nobody holds, are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_STAGED}*"):
        with contextlib.suppress(OSError):  # gone already, or another user's
            if left.stat().st_mtime < time.time() - YOUNG_SECONDS:
                lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=_STAGED))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _flocked(lock: int, store: Store) -> Iterator[None]:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "wait for it, or choose another --to"
            raise UserError("another process is writing this corpus", where=str(store), fix=fix) from error
        except OSError as error:
            what = f"cannot be locked: {error.strerror or error}"
            raise UserError(what, where=str(store), fix="choose another --to") from error
        yield
    finally:
        os.close(lock)


@dataclass(frozen=True)
class StorageProbe:
    """Whether the machine that calls it reads the input and writes to the same place as the one that made it.

    Attributes:
        files: (path, bytes) of some input files.
        name: of a file in the store that only its maker knows.
    """

    store: Store
    files: tuple[tuple[str, int], ...]
    name: str

    def __call__(self) -> None:
        """Raises `UserError` with what this machine cannot do."""
        fix = "put the input, and --to unless it is a URL, on storage that all nodes have at the same path"
        for name, size in self.files:
            try:
                found = Path(name).stat().st_size
                with Path(name).open("rb") as stream:
                    stream.read(1)
            except OSError as error:
                what = f"a worker on {platform.node()} cannot read the input: {error.strerror or error}"
                raise UserError(what, where=name, fix=fix) from error
            if found != size:
                what = f"a worker on {platform.node()} sees {found:,} bytes of an input of {size:,}"
                raise UserError(what, where=name, fix=fix)
        own = f"probe-{secrets.token_hex(8)}.tmp"
        try:
            is_seen = self.store.size(self.name) is not None
            if is_seen:
                self.store.write(own, {})
                self.store.remove(own)
        except UserError as error:  # of a URL: no library, credentials or way to it, there
            what = f"a worker on {platform.node()} cannot use the output: {error.what}"
            raise UserError(what, where=error.where, fix=error.fix) from error
        except OSError as error:
            what = f"a worker on {platform.node()} cannot write the output: {error.strerror or error}"
            raise UserError(what, where=str(self.store), fix=fix) from error
        if not is_seen:
            what = f"a worker on {platform.node()} does not see what is written here"
            raise UserError(what, where=str(self.store), fix=fix)
