"""Encode a large corpus into shards: `python scripts/tokenize_corpus.py books/ more.jsonl --tokenizer gpt2 --to corpus`.

The same command goes on after a kill. Then: `python train.py task=pretrain data=shards data.path=corpus ...`, as the last
line it prints says.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lmlab.config.compose import run_script
from lmlab.records import RunFailedError, UserError

if TYPE_CHECKING:
    from lmlab.data.corpus import StartTeam
    from lmlab.data.crew import Progress
    from lmlab.data.store import StorageProbe
    from lmlab.data.units import CorpusEncoder

SIGTERM_EXIT = 143
PLAIN_SECONDS = 10.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    stopped = "interrupted: finished units stay, the same command goes on"
    return run_script(lambda: _told(options), stopped=stopped)


def _told(options: argparse.Namespace) -> int:
    """The work, its errors in this script's words."""
    try:
        return _tokenize(options)
    except UserError as error:
        raise _in_our_words(error) from error
    except OSError as error:  # a full disk, a folder that went away: what is finished stays
        place = f" ({error.filename})" if error.filename else ""
        raise RunFailedError(
            f"{error.strerror or error}{place}: make room, then give the same command"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenize_corpus.py", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders, globs or s3:// URLs of them"
    )
    parser.add_argument("--tokenizer", required=True, help="a directory, a tokenizer.json or a hub name")
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder or an s3:// URL")
    parser.add_argument("--workers", type=int, help="processes (default: CPUs, of the cluster with --ray)")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="spread over a Ray cluster: auto, HOST:PORT, or local (here only)"
    )
    parser.add_argument("--val-fraction", type=float, default=0.005, help="held out by a hash of the text")
    parser.add_argument("--columns", default="text=text", metavar="text=NAME", help="the field with the text")
    parser.add_argument("--shard-mb", type=float, default=64, help="megabytes of input per shard, at most")
    parser.add_argument("--on-bad-record", choices=("error", "skip"), default="error")
    parser.add_argument("--limit-documents", type=int, metavar="N", help="only the first N")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument("--verify", action="store_true", help="hash what an interrupted run left")
    return parser


def _tokenize(options: argparse.Namespace) -> int:
    from lmlab.data.corpus import CorpusOptions, build_corpus
    from lmlab.data.files import find_files
    from lmlab.remote import copy_of, is_url, without_file_scheme

    _check(options)
    files = [file for pattern in options.paths for file in find_files(pattern)]
    # What is written there is no input, nor are the copies of it.
    made = (copy_of(options.to) if is_url(options.to) else Path(without_file_scheme(options.to))).resolve()
    files = [file for file in files if made not in file.resolve().parents]
    if not files:
        raise UserError("no data file but what was written here", where=options.to, fix="give other files")
    settings = CorpusOptions(
        val_fraction=options.val_fraction,
        column=options.columns.partition("=")[2],
        shard_bytes=int(options.shard_mb * 1e6),
        on_bad_record=options.on_bad_record,
        limit_documents=options.limit_documents,
    )
    from lmlab.tokenizers import load_tokenizer, tokenizer_hash
    from lmlab.tokenizers.fast import FastEncoder

    tokenizer = load_tokenizer(options.tokenizer)
    encoder = FastEncoder(tokenizer)
    if encoder.mode == "windows":
        print("tokenizer: no word cache for this kind, so no faster than its library", file=sys.stderr)
    began = time.monotonic()
    with _Progress() as progress:
        index = build_corpus(
            files,
            options.to,
            encoder,
            settings,
            tokenizer_hash=tokenizer_hash(tokenizer, with_chat=False),
            save_tokenizer=tokenizer.save_pretrained,
            workers=options.workers or (sys.maxsize if options.ray else os.cpu_count() or 1),
            team=_team(options),
            overwrite=options.overwrite,
            verify=options.verify,
            progress=progress,
        )
    _tell(index.report, options.to, seconds=time.monotonic() - began, encoded=progress.encoded)
    return 0


def _team(options: argparse.Namespace) -> StartTeam:
    """Who does the work."""
    from lmlab.data.corpus import local_team
    from lmlab.data.ray_crew import RayCrew

    if options.ray is None:
        return local_team

    def on_ray(encoder: CorpusEncoder, workers: int, progress: Progress, probe: StorageProbe) -> RayCrew:
        return RayCrew(encoder, workers, progress, address=options.ray, probe=probe, cpus=options.workers)

    return on_ray


def _check(options: argparse.Namespace) -> None:
    """Refuse values that argparse lets pass.

    Raises:
        UserError: the first of them.
    """
    for name, ok, fix in (
        ("workers", options.workers is None or options.workers >= 1, "at least 1"),
        (
            "to",
            not options.to.startswith("memory:"),
            "a folder or an s3:// URL: memory ends with the command",
        ),
        ("ray", options.ray is None or options.ray.strip() != "", "auto, local or HOST:PORT"),
        ("val-fraction", 0 < options.val_fraction < 1, "between 0 and 1"),
        ("shard-mb", 1e-6 <= options.shard_mb < float("inf"), "above 0"),
        ("limit-documents", options.limit_documents is None or options.limit_documents >= 1, "at least 1"),
    ):
        if not ok:
            value = getattr(options, name.replace("-", "_"))
            raise UserError(f"bad value {value}", where=f"--{name}", fix=fix)
    key, _, column = options.columns.partition("=")
    if key != "text" or not column:
        raise UserError(f"bad value {options.columns}", where="--columns", fix="text=NAME_OF_THE_FIELD")


def _in_our_words(error: UserError) -> UserError:
    """The same error with this script's options in place of a run's keys."""
    where, fix = (
        text and text.replace("data.on_bad_record=skip", "--on-bad-record skip").replace("data.path", "PATH")
        for text in (error.where, error.fix)
    )
    return UserError(error.what, where=where, fix=fix)


def _tell(report: dict[str, Any], place: str, *, seconds: float, encoded: int) -> None:
    size = sum(report[split]["supervised_bytes"] for split in ("train", "val"))
    rate = f", {encoded / 1e6 / seconds:.1f} MB/s" if encoded else " (all of it was there)"
    dropped = ", ".join(f"{reason}: {count}" for reason, count in report["records_dropped"].items())
    print(
        f"{report['records_kept']:,} documents, {size:,} bytes, {report['tokens']:,} tokens "
        f"({size / max(1, report['tokens']):.2f} bytes per token) in {seconds:.1f} s{rate}"
    )
    for split in ("train", "val"):
        about = report[split]
        print(f"{split}: {about['records']:,} documents, {about['tokens']:,} tokens")
    if dropped:
        print(f"dropped: {dropped}")
    print(f"written: {place}")
    print(
        f"use it: python train.py task=pretrain data=shards data.path={place} "
        f"tokenizer=file tokenizer.path={place.rstrip('/')}/tokenizer"
    )


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = ("{task.description}", BarColumn(), "{task.percentage:3.0f}%")
        self._bar = Progress(
            *columns,
            TransferSpeedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._plain = not console.is_terminal
        self._tasks: dict[str, Any] = {}
        self._told = time.monotonic()
        self.encoded = 0
        """Bytes encoded by this run."""
        self._first = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, completed=done)
            self._first = done
        self._bar.update(self._tasks[stage], completed=done)
        if stage == "encode":
            self.encoded = done - self._first
        if self._plain and time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            print(f"{stage}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr)


def _terminated(number: int, frame: FrameType | None) -> None:
    print("terminated: finished units stay, the same command goes on", file=sys.stderr)
    sys.exit(SIGTERM_EXIT)


if __name__ == "__main__":
    sys.exit(main())
