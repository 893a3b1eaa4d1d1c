"""Encode a corpus of any size into shards, by several workers, resumable after a kill at any time.

Two passes. The first hashes every document (fast): that fixes the split, proves that the input is what it was when an
interrupted run began, and finds bad records before hours of work. The second encodes: a unit of the input
(documents.py) becomes one shard per split, written under temporary names, made durable and renamed, and then noted in
``units/NUMBER.json``. What is noted is done; a kill loses the units being written. Which worker did what leaves no
trace: the bytes are the same for any number of them, processes of this machine (crew.py) or actors of a Ray cluster
(ray_crew.py), written to a folder or to a URL (store.py).

    DIR/index.json    tokenizer, settings, sources with their hashes, and the report: written last
    DIR/train, val    shards (shards.py); ``start`` is a single EOS, so that the first document is predicted from it too
    DIR/tokenizer     what the ids mean (saved by the caller)
    DIR/plan.json, units/   of an unfinished run
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data.crew import Crew, Progress, Team
from lmlab.data.documents import Part, plan_units
from lmlab.data.shards import INDEX, ShardWriter, write_index
from lmlab.data.store import StorageProbe, Store, store_at
from lmlab.data.units import (
    UNITS,
    CorpusEncoder,
    ScanJob,
    UnitFacts,
    UnitJob,
    encode_unit,
    scan_unit,
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
    def load(cls, place: Path | str) -> CorpusIndex:
        """Read the index of the corpus at a path or URL.

        Raises:
            UserError: nothing there, or not finished.
        """
        store = store_at(place)
        try:
            return cls(**store.read(INDEX))
        except TypeError as error:
            unfinished = store.size(PLAN) is not None
            raise UserError(
                "this corpus is not finished" if unfinished else "no corpus made by tokenize_corpus.py",
                where=str(store),
                fix="run the same tokenize_corpus.py command again" if unfinished else "check the path",
            ) from error


StartTeam = Callable[[CorpusEncoder, int, Progress, StorageProbe], AbstractContextManager[Team[Any]]]
"""Makes the workers: (encoder, at most so many, progress, what each has to show first where it runs elsewhere)."""


def local_team(
    encoder: CorpusEncoder, workers: int, progress: Progress, probe: StorageProbe
) -> AbstractContextManager[Team[Any]]:
    """Processes of this machine, which need no probe."""
    return Crew(encoder, workers, progress)


def build_corpus(
    files: Sequence[Path],
    place: Path | str,
    encoder: CorpusEncoder,
    options: CorpusOptions,
    *,
    tokenizer_hash: str,
    save_tokenizer: Callable[[Path], object],
    workers: int,
    team: StartTeam = local_team,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> CorpusIndex:
    """Write the corpus of ``files`` to ``place``, going on where an interrupted run of the same kind stopped.

    Args:
        place: a folder or a URL.
        save_tokenizer: writes the tokenizer into a directory.
        workers: at most so many; neither they nor ``team`` have an influence on what is written.
        overwrite: begin anew whatever is there.
        verify: hash what an interrupted run left, and not only look at sizes.
        progress: called with the stage, and bytes done and in all.

    Raises:
        UserError: nothing to encode, a bad record, or a place of other settings, input or tokenizer.
        RunFailedError: a worker died, or the disk is full; what is finished stays.
    """
    plan = _begun_plan(encoder, options, tokenizer_hash)
    store = store_at(place)
    with _opened(store, overwrite=overwrite):
        kept = store.read(INDEX) or store.read(PLAN)
        _refuse_other(kept, plan, store)
        store.drop_leftovers()
        units = plan_units(files, shard_bytes=options.shard_bytes)
        with (
            _probe(store, files) as probe,
            team(encoder, min(workers, len(units)), progress, probe) as crew,
        ):
            facts = _scanned(units, options, crew)
            plan["sources"] = [
                {**asdict(part), "sha256": digest}
                for unit, about in zip(units, facts, strict=True)
                for part, digest in zip(unit, about.hashes, strict=True)
            ]
            _refuse_other(kept, plan, store)
            if store.size(INDEX) is None:
                store.write(PLAN, plan)
                with store.staged() as folder:
                    save_tokenizer(folder / "tokenizer")
                jobs = _jobs(units, facts, store, options)
                _encode(store, jobs, crew, verify=verify)
                _finish(store, plan, jobs, encoder)
        # Under the lock still: the next run may begin anew as soon as it is free.
        store.remove(UNITS, PLAN)
        store.drop_leftovers()
        return CorpusIndex.load(place)


def _begun_plan(encoder: CorpusEncoder, options: CorpusOptions, tokenizer_hash: str) -> dict[str, Any]:
    """What has to be the same for a run to go on with another's work; the sources follow when they are hashed."""
    if encoder.eos_token_id is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise UserError("the tokenizer has no end-of-text token", where="--tokenizer", fix=fix)
    return {
        "format": FORMAT,
        "tokenizer_hash": tokenizer_hash,
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos_token_id,
        "settings": asdict(options),
    }


@contextlib.contextmanager
def _opened(store: Store, *, overwrite: bool) -> Iterator[None]:
    """The store for one run alone; emptied under ``overwrite``."""
    there = [name for name in (INDEX, PLAN) if store.size(name) is not None]
    # Others' folders have an index.json too, and --overwrite must not empty them.
    if not all("format" in store.read(name) for name in there) or not (there or store.is_empty()):
        raise UserError("not empty, and no corpus", where=str(store), fix="choose another --to")
    with store.locked():
        if overwrite:
            store.write(PLAN, {"format": FORMAT})  # a kill from here on leaves no finished-looking corpus
            store.remove(INDEX, *SPLITS, UNITS, "tokenizer", PLAN)
        yield


@contextlib.contextmanager
def _probe(store: Store, files: Sequence[Path]) -> Iterator[StorageProbe]:
    """For workers elsewhere; its file is there as long as they may start."""
    some = dict.fromkeys((*files[:1], *files[-1:]))
    name = f"here-{secrets.token_hex(8)}.tmp"
    store.write(name, {})
    try:
        yield StorageProbe(store, tuple((str(file), file.stat().st_size) for file in some), name)
    finally:
        store.remove(name)


def _refuse_other(kept: dict[str, Any], plan: dict[str, Any], store: Store) -> None:
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
            where=str(store),
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


def _scanned(units: list[tuple[Part, ...]], options: CorpusOptions, crew: Team[Any]) -> list[UnitFacts]:
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
    units: list[tuple[Part, ...]], facts: list[UnitFacts], store: Store, options: CorpusOptions
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
            store=store,
            on_bad_record=options.on_bad_record,
            column=options.column,
            limit=about.documents if about.is_cut else None,
            val_up_to=val_up_to,
            cut=cut,
        )
        for number, (unit, about) in enumerate(zip(units, facts, strict=True))
        if about.documents or about.read
    ]


def _encode(store: Store, jobs: list[UnitJob], crew: Team[Any], *, verify: bool) -> None:
    """Those that are not done yet."""
    notes = _finished(store, jobs, verify=verify)
    left = [job for job, note in zip(jobs, notes, strict=True) if not note]
    total, open_bytes = (sum(job.num_bytes for job in each) for each in (jobs, left))
    crew.run("encode", encode_unit, left, total=total, done=total - open_bytes)


def _cut(only: UnitFacts, val_fraction: float) -> int:
    """Of a single text: the character where its validation part begins (white space alone is none)."""
    end = only.num_chars - max(1, round(only.num_chars * val_fraction))
    end = min(end, only.num_visible - 1)
    if end < 1:
        what = f"a text of {only.num_chars} characters is too short to hold out its last part"
        raise UserError(what, where="PATH", fix="give more text")
    return end


def _finished(store: Store, jobs: list[UnitJob], *, verify: bool = False) -> list[dict[str, Any]]:
    """What the note of each unit says, if all it speaks of is there; else {}."""
    there = store.sizes()
    notes = iter(store.read_many([job.note for job in jobs if job.note in there]))
    found = [next(notes) if job.note in there else {} for job in jobs]

    def is_whole(note: dict[str, Any]) -> bool:
        for split, entry in note.get("entries", {}).items():
            sizes = {
                "tokens": entry["tokens"] * np.dtype(entry["dtype"]).itemsize,
                "offsets": 8 * (entry["documents"] + 1),
            }
            for kind, size in sizes.items():
                file = f"{split}/{entry['name']}.{kind}"
                if there.get(file) != size:
                    return False
                if verify and store.sha256(file) != entry["sha256"][kind]:
                    return False
        return True

    return [note if is_whole(note) else {} for note in found]


def _finish(store: Store, plan: dict[str, Any], jobs: list[UnitJob], encoder: CorpusEncoder) -> None:
    """Indexes of the splits and, last, of the corpus."""
    notes = _finished(store, jobs)
    assert all(notes)
    with store.staged() as folder:
        for split in SPLITS:
            start = ShardWriter(folder / split, "start", vocab_size=encoder.vocab_size, flags=False)
            start.add(np.asarray([encoder.eos_token_id]))
            entries = [note["entries"][split] for note in notes if split in note["entries"]]
            write_index(folder / split, [start.close(), *entries], bos_token_id=encoder.bos_token_id)
    store.write(INDEX, {**plan, "report": _report(notes, with_bos=encoder.bos_token_id is not None)})


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
