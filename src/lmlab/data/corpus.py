"""Encode a corpus of any size into shards, by several processes, resumable after a kill at any time.

Two passes. The first hashes every document (fast): that fixes the split, proves that the input is what it was when an
interrupted run began, and finds bad records before hours of work. The second encodes: a unit of the input
(documents.py) becomes one shard per split, written under temporary names, made durable and renamed, and then noted in
``units/NUMBER.json``. What is noted is done; a kill loses the units being written. Which process did what leaves no
trace: the bytes are the same for any number of them.

    DIR/index.json    tokenizer, settings, sources with their hashes, and the report: written last
    DIR/train, val    shards (shards.py); ``start`` is a single EOS, so that the first document is predicted from it too
    DIR/tokenizer     what the ids mean (saved by the caller)
    DIR/plan.json, units/   of an unfinished run
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data.crew import Crew
from lmlab.data.documents import Part, plan_units
from lmlab.data.readers import raw_pieces
from lmlab.data.shards import INDEX, ShardWriter, write_index
from lmlab.data.units import (
    UNITS,
    CorpusEncoder,
    ScanJob,
    UnitFacts,
    UnitJob,
    encode_unit,
    scan_unit,
    write_json,
)
from lmlab.records import UserError

FORMAT = 1
SPLITS = ("train", "val")
PLAN = "plan.json"


@dataclass(frozen=True)
class CorpusOptions:
    """What decides the bytes that are written, beside input and tokenizer.

    Attributes:
        val_fraction: share of documents held out by a hash of their text; of a single document, its last part.
        column: field of a record that holds its text.
        shard_bytes: of input per shard; files that cannot be cut may be larger.
        on_bad_record: ``error`` stops, ``skip`` counts.
        limit_documents: only the first so many; None for all.
    """

    val_fraction: float
    column: str
    shard_bytes: int
    on_bad_record: str
    limit_documents: int | None


@dataclass(frozen=True)
class CorpusIndex:
    """The index.json of a finished corpus; ``report`` has the keys of a data report."""

    format: int
    tokenizer_hash: str
    vocab_size: int
    eos_token_id: int
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    report: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> CorpusIndex:
        """Read ``folder``'s index.

        Raises:
            UserError: nothing there, or not finished.
        """
        try:
            return cls(**json.loads((folder / INDEX).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            unfinished = (folder / PLAN).exists()
            raise UserError(
                "this corpus is not finished" if unfinished else "no corpus made by tokenize_corpus.py",
                where=str(folder),
                fix="run the same tokenize_corpus.py command again" if unfinished else "check the path",
            ) from error


def build_corpus(
    files: Sequence[Path],
    folder: Path,
    encoder: CorpusEncoder,
    options: CorpusOptions,
    *,
    tokenizer_hash: str,
    save_tokenizer: Callable[[Path], object],
    workers: int,
    overwrite: bool = False,
    verify: bool = False,
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
) -> CorpusIndex:
    """Write the corpus of ``files`` to ``folder``, going on where an interrupted run of the same kind stopped.

    Args:
        save_tokenizer: writes the tokenizer into a directory.
        workers: processes; has no influence on what is written.
        overwrite: begin anew whatever is there.
        verify: hash what an interrupted run left, and not only look at sizes.
        progress: called with the stage, and bytes done and in all.

    Raises:
        UserError: nothing to encode, a bad record, or a folder of other settings, input or tokenizer.
        RunFailedError: a worker died, or the disk is full; what is finished stays.
    """
    if encoder.eos_token_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise UserError("the tokenizer has no end-of-text token", where="--tokenizer", fix=fix)
    plan = {
        "format": FORMAT,
        "tokenizer_hash": tokenizer_hash,
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos_token_id,
        "settings": asdict(options),
    }
    with _locked(folder, overwrite=overwrite):
        kept = _read(folder / INDEX) or _read(folder / PLAN)
        _refuse_other(kept, plan, folder)
        units = plan_units(files, shard_bytes=options.shard_bytes)
        with Crew(encoder, min(workers, len(units)), progress) as crew:
            facts = _scanned(units, options, crew)
            plan["sources"] = [
                {**asdict(part), "sha256": digest}
                for unit, about in zip(units, facts, strict=True)
                for part, digest in zip(unit, about.hashes, strict=True)
            ]
            _refuse_other(kept, plan, folder)
            if not (folder / INDEX).exists():
                write_json(folder / PLAN, plan)
                _clear_leftovers(folder)
                save_tokenizer(folder / "tokenizer")
                jobs = _jobs(units, facts, folder, options)
                open_jobs = [job for job in jobs if _finished(job, verify=verify) is None]
                total, left = (sum(job.num_bytes for job in each) for each in (jobs, open_jobs))
                crew.run("encode", encode_unit, open_jobs, total=total, done=total - left)
                _finish(folder, plan, jobs, encoder)
    _drop_working_files(folder)
    return CorpusIndex.load(folder)


@contextlib.contextmanager
def _locked(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """The folder, made if need be, for one run alone; emptied under ``overwrite``."""
    ours = (folder / INDEX).exists() or (folder / PLAN).exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("not empty, and no corpus", where=str(folder), fix="choose another --to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made: {error.strerror or error}", where=str(folder), fix="choose another --to"
        ) from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "wait for it, or choose another --to"
            raise UserError("another process is writing this corpus", where=str(folder), fix=fix) from error
        if overwrite:
            for name in (INDEX, PLAN):  # first, so that a kill here leaves no finished-looking corpus
                (folder / name).unlink(missing_ok=True)
            write_json(folder / PLAN, {"format": FORMAT})
            for name in (*SPLITS, UNITS, "tokenizer"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / PLAN).unlink()
        yield
    finally:
        os.close(lock)


def _refuse_other(kept: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with (or to take as finished) what was made otherwise; looks only at what ``plan`` says yet."""
    if not kept:
        return
    old, new = kept.get("settings", {}), plan["settings"]
    differ = [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    if kept.get("format") != plan["format"]:
        differ = ["another version of lmlab's format"]
    elif kept.get("tokenizer_hash") != plan["tokenizer_hash"]:
        differ.append("another tokenizer")
    elif "sources" in plan:
        differ += _other_sources(kept.get("sources", []), plan["sources"])
    if differ:
        raise UserError(
            f"this corpus was begun with other settings or input: {'; '.join(differ)}",
            where=str(folder),
            fix="use the same ones, another --to, or --overwrite",
        )


def _other_sources(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    for before, now in zip(old, new, strict=False):
        names = [Path(source["file"]).name for source in (before, now)]
        if names[0] != names[1]:
            return [f"file {names[0]} was there, now {names[1]}"]
        if (before["start"], before["end"], before["sha256"]) != (now["start"], now["end"], now["sha256"]):
            return [f"{names[0]} has changed"]
    return [f"{len(old)} parts of files, now {len(new)}"] if len(old) != len(new) else []


def _scanned(units: list[tuple[Part, ...]], options: CorpusOptions, crew: Crew) -> list[UnitFacts]:
    """Facts of every unit; a limit on documents cuts off what lies behind it."""
    total = sum(part.end - part.start for unit in units for part in unit)
    jobs = [ScanJob(unit, options.on_bad_record, options.column) for unit in units]
    facts: list[UnitFacts] = crew.run("scan", scan_unit, jobs, total=total)
    left = options.limit_documents
    if left is None:
        return facts
    for number, job in enumerate(jobs):
        if facts[number].documents > left:
            facts[number] = scan_unit(replace(job, limit=left), None, lambda count: None)
            facts[number].is_cut = True
        left -= facts[number].documents
    return facts


def _jobs(
    units: list[tuple[Part, ...]], facts: list[UnitFacts], folder: Path, options: CorpusOptions
) -> list[UnitJob]:
    documents = sum(about.documents for about in facts)
    if not documents:
        dropped = sum((about.dropped for about in facts), Counter[str]())
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(dropped.items())) or "none"
        raise UserError(f"no document to encode (dropped {reasons})", where="PATH", fix="give more files")
    smallest = min(about.smallest for about in facts)
    largest = max(about.largest for about in facts)
    val_up_to = max(options.val_fraction, smallest)
    if largest <= val_up_to:  # a handful of documents that all fell below: hold out the smallest only
        val_up_to = smallest
    cut = _cut(next(a for a in facts if a.documents), options.val_fraction) if documents == 1 else None
    if documents > 1 and largest == smallest:
        raise UserError("all documents are the same", where="PATH", fix="give others, to hold one out")
    return [
        UnitJob(
            number=number,
            parts=unit,
            folder=folder,
            on_bad_record=options.on_bad_record,
            column=options.column,
            limit=about.documents if about.is_cut else None,
            val_up_to=val_up_to,
            cut=cut,
        )
        for number, (unit, about) in enumerate(zip(units, facts, strict=True))
        if about.documents or about.read
    ]


def _cut(only: UnitFacts, val_fraction: float) -> int:
    """Of a single text: the character where its validation part begins (white space alone is none)."""
    end = only.num_chars - max(1, round(only.num_chars * val_fraction))
    end = min(end, only.num_visible - 1)
    if end < 1:
        what = f"a text of {only.num_chars} characters is too short to hold out its last part"
        raise UserError(what, where="PATH", fix="give more text")
    return end


def _finished(job: UnitJob, *, verify: bool = False) -> dict[str, Any] | None:
    """What the unit's note says, if all it speaks of is there."""
    note = _read(job.note)
    for split, entry in note.get("entries", {}).items():
        sizes = {
            "tokens": entry["tokens"] * np.dtype(entry["dtype"]).itemsize,
            "offsets": 8 * (entry["documents"] + 1),
        }
        for kind, size in sizes.items():
            file = job.folder / split / f"{entry['name']}.{kind}"
            if not file.is_file() or file.stat().st_size != size:
                return None
            if verify and _hash(file) != entry["sha256"][kind]:
                return None
    return note or None


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    for piece in raw_pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def _finish(folder: Path, plan: dict[str, Any], jobs: list[UnitJob], encoder: CorpusEncoder) -> None:
    """Indexes of the splits and, last, of the corpus."""
    notes = [note for job in jobs if (note := _finished(job)) is not None]
    assert len(notes) == len(jobs)
    for split in SPLITS:
        start = ShardWriter(folder / split, "start", vocab_size=encoder.vocab_size, flags=False)
        start.add(np.asarray([encoder.eos_token_id]))
        entries = [note["entries"][split] for note in notes if split in note["entries"]]
        write_index(folder / split, [start.close(), *entries], bos_token_id=encoder.bos_token_id)
    write_json(folder / INDEX, {**plan, "report": _report(notes, with_bos=encoder.bos_token_id is not None)})


def _report(notes: list[dict[str, Any]], *, with_bos: bool) -> dict[str, Any]:
    def total(split: str, name: str) -> int:
        return sum(note["entries"][split][name] for note in notes if split in note["entries"])

    sides = {
        split: {
            "records": total(split, "documents"),
            "tokens": total(split, "tokens"),
            # A BOS stands for no text, so it is read and not trained.
            "supervised_tokens": total(split, "tokens") - (total(split, "documents") if with_bos else 0),
            "supervised_bytes": sum(note["bytes"].get(split, 0) for note in notes),
        }
        for split in SPLITS
    }
    dropped = sum((Counter(note["dropped"]) for note in notes), Counter[str]())
    read = sum(note["read"] for note in notes)
    tokens = sum(side["tokens"] for side in sides.values())
    return {
        "records_read": read,
        "records_kept": read - dropped.total(),
        "records_dropped": dict(sorted(dropped.items())),
        "dropped_examples": [row for note in notes for row in note["dropped_examples"]][:20],
        "records_truncated": 0,
        "tokens": tokens,
        "supervised_tokens": sum(side["supervised_tokens"] for side in sides.values()),
        **sides,
    }


def _clear_leftovers(folder: Path) -> None:
    for split in (*SPLITS, UNITS):
        for file in (folder / split).glob("*.tmp"):
            file.unlink()


def _drop_working_files(folder: Path) -> None:
    shutil.rmtree(folder / UNITS, ignore_errors=True)
    (folder / PLAN).unlink(missing_ok=True)
    _clear_leftovers(folder)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
