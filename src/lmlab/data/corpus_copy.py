"""A corpus of tokenize_corpus.py where training can map it: its own folder, or the copy of a URL on this machine.

A copy stands under LMLAB_CACHE in a folder named by its URL and its content, so a corpus that is made anew never mixes with
what a running job has mapped. Its indexes and its tokenizer come first, the shards once they are known to be wanted; each
shard is checked against the hash in its index when it is loaded, and not again as long as size and time of the file stay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data.shards import INDEX
from lmlab.data.split import SIDES
from lmlab.records import UserError
from lmlab.remote import Remote, copy_of, fetch, fetch_below, is_url, missing_bytes, without_file_scheme

AT_ONCE = 4
"""Files loaded side by side; each holds one range of some megabytes."""
SAY_SECONDS = 10.0


def corpus_folder(path: str) -> Path:
    """The folder in which the corpus at a path or URL has its index.json, its tokenizer and (`fetch_shards`) its shards.

    Raises:
        UserError: nothing there at the URL, or its storage does not answer.
    """
    if not is_url(path):
        return Path(without_file_scheme(path)).expanduser().absolute()
    source = Remote(path.rstrip("/"))
    folder = copy_of(source.url)
    folder = folder.with_name(f"{folder.name}@{corpus_key(path)[:8]}")
    for name in (INDEX, *(f"{split}/{INDEX}" for split in SIDES[:2])):
        fetch(source / name, folder / name)
    fetch_below(source / "tokenizer", folder / "tokenizer")
    return folder


def corpus_key(path: str) -> str:
    """Hash of the place, as nothing of it is copied under the key, and of the indexes, which have the hashes of all shards.

    Raises:
        UserError: no such place, or one without an index.
    """
    fix = "give the directory or URL that scripts/tokenize_corpus.py --to has written"
    digest = hashlib.sha256()
    if is_url(path):
        source = Remote(path.rstrip("/"))
        digest.update(source.url.encode())
        for name in (INDEX, *(f"{split}/{INDEX}" for split in SIDES[:2])):
            content = (source / name).read()
            if content is None:
                raise UserError("no shards: no such file", where=str(source / name), fix=fix)
            digest.update(content)
        return digest.hexdigest()
    index = corpus_folder(path) / INDEX
    try:
        return hashlib.sha256(str(index.parent).encode() + index.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"no shards: {error.strerror or error}", where=str(index), fix=fix) from error


def fetch_shards(path: str) -> None:
    """Load what is missing of the shards of a URL; of a directory nothing is.

    Raises:
        UserError: too little room, a file that is not what its index says, or a storage that does not answer.
    """
    if not is_url(path):
        return
    source, folder = Remote(path.rstrip("/")), corpus_folder(path)
    wanted = [
        (f"{split}/{entry['name']}.{kind}", digest, _size(entry, kind))
        for split in SIDES[:2]
        for entry in json.loads((folder / split / INDEX).read_text(encoding="utf-8"))["shards"]
        for kind, digest in entry["sha256"].items()
    ]
    total = sum(missing_bytes(folder / name, digest, size) for name, digest, size in wanted)
    room = shutil.disk_usage(folder).free
    if total > room:
        what = f"{total / 1e9:,.1f} GB to load, {room / 1e9:,.1f} GB of room in {folder}"
        raise UserError(what, where=source.url, fix="set LMLAB_CACHE to a larger disk")
    loaded = _Loaded(source.url, total)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [
            pool.submit(fetch, source / name, folder / name, sha256=digest, told=loaded)
            for name, digest, _ in wanted
        ]
        try:
            for each in running:
                each.result()
        except BaseException:
            loaded.is_stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _size(entry: dict[str, Any], kind: str) -> int:
    if kind == "offsets":
        return 8 * (entry["documents"] + 1)
    return entry["tokens"] * (np.dtype(entry["dtype"]).itemsize if kind == "tokens" else 1)


class _Loaded:
    """Says what is loaded, if it takes some time."""

    def __init__(self, url: str, total: int) -> None:
        self.url, self.total, self.done, self.told = url, total, 0, time.monotonic()
        self.is_stopped = False

    def __call__(self, count: int) -> None:
        if self.is_stopped:  # the loads at work end here, each with what it has
            raise InterruptedError("another file failed, or Ctrl-C")
        self.done += count
        if time.monotonic() - self.told > SAY_SECONDS:
            self.told = time.monotonic()
            print(
                f"loading {self.url}: {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB", file=sys.stderr
            )
