"""Which files a path means, a key of their content, and their records (readers.py, tables.py).

Files at a URL (``s3://bucket/folder``) are read from their copies on this machine (lmlab/remote.py).

``where`` of a record is what a person would open: ``train.jsonl:17``, ``list.json[3]``, ``rows.parquet[3]``.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lmlab.data.intake import Intake
from lmlab.data.readers import (
    BOM,
    data_suffix,
    is_packed,
    raw_pieces,
    read_json,
    read_jsonl,
    read_text,
)
from lmlab.data.tables import read_csv, read_parquet
from lmlab.records import Record, UserError
from lmlab.registry import suggest
from lmlab.remote import Remote, copy_of, fetch, is_url, without_file_scheme

__all__ = ["BOM", "TEXT_SUFFIXES", "Intake", "data_suffix", "files_key", "find_files", "read_file"]

TEXT_SUFFIXES = (".txt", ".md")
READERS: dict[str, Callable[[Path, Intake], Iterator[Record]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
"""By suffix; each takes the .gz of its files too."""


def find_files(pattern: str) -> list[Path]:
    """The file, the readable files of the folder (sorted) or the matches of the glob that ``pattern``, a path or URL, means.

    Raises:
        UserError: nothing there, or a suffix that is not read.
    """
    fix = f"a {'/'.join(READERS)} file or a .gz of one, a folder or a glob of them"
    if not pattern.strip():
        raise UserError("no data file given", where="data.path", fix=fix)
    if is_url(pattern):
        return _copies(Remote(pattern), fix)
    pattern = without_file_scheme(pattern)
    try:
        path = Path(pattern).expanduser()
        if path.is_dir():
            return _in_folder(path, fix)
        found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        found = [file for file in found if _is_data(file)]
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a folder not ours
        raise UserError(
            f"cannot be looked up: {getattr(error, 'strerror', None) or error}",
            where=f"data.path={pattern[:80]}",
            fix=fix,
        ) from error
    if not found:
        raise UserError(f"no such data file: {pattern}", where="data.path", fix=fix)
    for file in found:
        if data_suffix(file) not in READERS:
            raise _unknown_suffix(file)
    return found


def _is_data(file: Path) -> bool:
    """A file, or a link to nothing, which is reported and not passed over; a pipe would be waited for without end."""
    return file.is_file() or (file.is_symlink() and not file.exists())


def _copies(source: Remote, fix: str) -> list[Path]:
    """Copies of the file, the readable ones below the prefix or the matches of the glob."""
    files = source.files()
    named = [url for url in files if url.rstrip("/") == source.url.rstrip("/")]
    chosen = [url for url in files if data_suffix(Path(url)) in READERS and "/." not in url]
    if named and not chosen:
        raise _unknown_suffix(Path(source.url))
    if not chosen:
        what = f"no data file at {source}" + (f", which has {len(files)} others" if files else "")
        raise UserError(what, where="data.path", fix=f"{fix}; check AWS_ENDPOINT_URL")
    return [fetch(Remote(url), copy_of(url), about=files[url]) for url in chosen]


def _in_folder(folder: Path, fix: str) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    names = []
    for base, folders, files in os.walk(folder, onerror=refuse):
        # Hidden ones hold copies (.ipynb_checkpoints) and others' files (.git).
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(base, name) for name in files if not name.startswith(".")]
    found = sorted(file for file in names if data_suffix(file) in READERS and _is_data(file))
    if not found:
        suffixes = Counter(file.suffix or "no suffix" for file in names).most_common(5)
        holds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
        what = f"no data file in the folder {folder}" + (f", which holds {holds}" if holds else "")
        raise UserError(what, where="data.path", fix=fix)
    return found


def _unknown_suffix(file: Path) -> UserError:
    suffix = data_suffix(file)
    kind = f"'{suffix}{'.gz' if is_packed(file) else ''}' files" if suffix else "files without a suffix"
    fix = "name it by what is in it: " if not suffix else ""
    return UserError(
        f"cannot read {kind}: {file}",
        where="data.path",
        fix=f"{fix}{suggest(suffix, READERS)}, or .gz of one",
    )


def files_key(files: list[Path]) -> str:
    """A hash of names and contents; where the files lie and when they were written do not matter."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0")
        content = hashlib.sha256()
        for piece in raw_pieces(file):
            content.update(piece)
        digest.update(content.digest())
    return digest.hexdigest()


def read_file(file: Path, intake: Intake) -> Iterator[Record]:
    """The file's records, each counted in ``intake``: one for a text, one a line, an item or a row of the others.

    Raises:
        UserError: the file cannot be read or is not what its suffix says, or holds nothing at all.
    """
    before = intake.read
    yield from READERS[data_suffix(file)](file, intake)
    if intake.read == before:
        raise UserError(
            "holds no record", where=str(file), fix="give a file with data, or leave it out of data.path"
        )
