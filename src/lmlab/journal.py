"""A run's directory: made once, locked, and filled line by line with what is true about the run.

metrics.jsonl, samples.jsonl and layers.jsonl are flushed at every line, so a killed run keeps what it logged; W&B only
mirrors them.
JSON files appear by rename, never half-written. Run names come from one safe alphabet and stay under the output root.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmlab.lines import Lines, plain
from lmlab.records import Sample, UserError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,127}")


def slug(text: str, *, max_length: int = 80) -> str:
    """``text`` as a safe run name; what does not fit becomes ``-``."""
    cleaned = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)
    cleaned = re.sub(r"\.{2,}", ".", cleaned).lstrip("-._=,+")
    return cleaned[:max_length].rstrip("-.,") or "run"


def check_run_name(name: str) -> str:
    """``name`` if it is safe as a folder name.

    Raises:
        UserError: it has characters outside the alphabet, is too long, or would leave the output root.
    """
    if not SAFE_NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"{name[:80]!r} is not a run name",
            where="run_name",
            fix="1 to 128 of A-Z a-z 0-9 . _ = , + - beginning with a letter or digit",
        )
    return name


class RunDir:
    """Paths of one run's directory (design: files of a run).

    Args:
        path: the directory, which `create` makes.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    def __getattr__(self, name: str) -> Path:
        names = {
            "config": "config.yaml",
            "info": "run.json",
            "metrics": "metrics.jsonl",
            "samples": "samples.jsonl",
            "layers": "layers.jsonl",
            "summary": "summary.json",
            "data_report": "data_report.json",
            "mask_preview": "mask_preview.txt",
            "mask_preview_json": "mask_preview.json",
            "checkpoints": "checkpoints",
            "best": "best",
            "base": "base",
            "tokenizer": "tokenizer",
            "report": "report.html",
            "lock": ".lock",
            "out_of_memory": ".out_of_memory",
            "resume_certificate": "resume_certificate.json",
            "reproduction": "reproduction.json",
        }
        if name in names:
            return self.path / names[name]
        raise AttributeError(name)

    def check_free(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse before anything is created.

        Raises:
            UserError: the directory exists and neither overwrite nor resume was asked for, another process is
                writing to it, or its place cannot be written to.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(
                "not a directory", where=str(self.path), fix="choose another run_name or output_root"
            )
        if self.path.exists() and any(self.path.iterdir()):
            holder = self.holder()
            if holder:
                raise self._held(holder)
            is_run = any(file.exists() for file in (self.config, self.info, self.lock))
            if (overwrite or resume) and not is_run:
                raise UserError(
                    f"not a run directory, so not {'overwritten' if overwrite else 'resumed'}",
                    where=str(self.path),
                    fix="choose another run_name or output_root",
                )
            if not overwrite and not resume:
                raise UserError(
                    "this run directory already exists",
                    where=str(self.path),
                    fix="choose another run_name, or resume=auto, or overwrite=true",
                )
        parent = next((p for p in self.path.parents if p.exists()), None)
        if parent is None or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(
                "the output directory cannot be written to",
                where=str(parent or self.path),
                fix="choose another output_root",
            )

    def create(self, *, overwrite: bool, resume: bool) -> None:
        """Make the directory and take its lock; with ``overwrite`` an old run's files are removed first."""
        self.check_free(overwrite=overwrite, resume=resume)
        if overwrite and not resume and self.path.exists():
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run directory cannot be made: {error.strerror}",
                where=str(self.path),
                fix="choose another output_root",
            ) from error
        self.take_lock()

    def take_lock(self) -> None:
        """Lock for this process; the lock of a process that no longer lives on this host is taken over.

        Raises:
            UserError: a living process, or one of another host, holds it.
        """
        mine = self.path / f".lock.{os.getpid()}.tmp"
        write_json(
            mine,
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "time": time.time(),
            },
        )
        try:
            for _ in range(3):
                with contextlib.suppress(FileExistsError):
                    self._publish(mine)
                    for folder in (self.path, self.best, self.checkpoints):
                        remove_leftovers(folder)
                    return
                holder = self.holder()
                if holder:
                    raise self._held(holder)
                self.lock.unlink(missing_ok=True)
            raise UserError("the lock is fought over", where=str(self.path), fix="choose another run_name")
        finally:
            mine.unlink(missing_ok=True)

    def _publish(self, mine: Path) -> None:
        """Give ``mine`` the lock's name; FileExistsError if there is a lock."""
        try:
            os.link(mine, self.lock)  # it is never seen half-written
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with self.lock.open("x", encoding="utf-8") as stream:
                stream.write(mine.read_text(encoding="utf-8"))

    def release(self) -> None:
        """Give the lock back, if it is this process's."""
        held = read_json(self.lock)
        if held.get("pid") == os.getpid() and held.get("host") == socket.gethostname():
            self.lock.unlink(missing_ok=True)

    def _held(self, holder: str) -> UserError:
        return UserError(
            f"another run is writing here ({holder})",
            where=str(self.path),
            fix=f"wait for it, or choose another run_name; if it is gone, delete {self.lock.name} there",
        )

    def holder(self) -> str | None:
        """Host and pid of a living process that holds the lock, else None."""
        held = read_json(self.lock)
        try:
            host, pid = str(held["host"]), int(held["pid"])
        except (ValueError, KeyError, TypeError):
            return None
        if host == socket.gethostname():
            if pid == os.getpid():
                return None
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, OverflowError):
                return None
            except PermissionError:
                pass
            started = _process_start(pid)
            if held.get("started") is not None and started is not None and held["started"] != started:
                return None  # the number was given to another process since
        return f"pid {pid} on {host}"


def _process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where /proc does not say."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(line.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def versions_of(*packages: str) -> dict[str, str]:
    """Package -> its installed version, or ``absent``."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def write_json(path: Path, value: Any, *, sync: bool = False) -> None:
    """Write a JSON file by rename in the same folder; a lone surrogate becomes its JSON escape.

    Args:
        sync: have its content on the disk before it gets its name.
    """
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, default=str) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        if sync:
            sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(target: Path, ending: str) -> Path:
    """A name in ``target``'s own folder for what is not it yet (``tmp``) or not it any more (``old``)."""
    return target.with_name(f".{target.name}.{os.getpid()}.{ending}")


def publish_folder(made: Path, target: Path) -> None:
    """Give a complete folder its final name, in the place of an older one; a crash at any point loses neither.

    Args:
        made: `beside` of target; on the same file system, or the rename would be a copy.
    """
    for path in (*(p for p in made.rglob("*") if not p.is_symlink()), made):
        sync_to_disk(path)
    old = beside(target, "old")
    if target.exists():
        target.rename(old)
    made.rename(target)
    sync_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<ending>tmp|old)")


def remove_leftovers(folder: Path) -> None:
    """Clear up after a crash: what was half made goes, and what was being replaced gets its name back.

    Only for the holder of the run's lock: what a living process is making would go too.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or match["name"] == "lock":  # a lock is made before it is held
            continue
        target = folder / match["name"]
        if match["ending"] == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if it is not there or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def earlier_texts(run: RunDir, *, begun: Path) -> dict[tuple[int, str, str], str]:
    """The last sample of each prompt and sampler, up to the checkpoint ``begun`` that ``run`` goes on from.

    Those of the run itself and, if it branched from another, of that one before it.

    Returns:
        ``(prompt_id, prompt, sampler) -> text``.
    """
    trunk = read_json(run.info).get("branched_from")
    parts = [*([Path(trunk)] if trunk else []), begun]
    files = [RunDir(part.parent.parent) for part in parts[:-1]] + [run]
    found: dict[tuple[int, str, str], str] = {}
    for part, of in zip(parts, files, strict=True):
        upto = read_json(part / "manifest.json").get("step", -1)
        for line in of.samples.read_bytes().split(b"\n") if of.samples.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                row = json.loads(line)
                if row["step"] <= upto:
                    found[row["prompt_id"], row["prompt"], row["sampler"]] = row["text"]
    return found


class Journal:
    """Appends to metrics.jsonl, samples.jsonl and layers.jsonl, handed to the system line by line.

    Args:
        run: the run's directory.
        start_time: monotonic time that the ``time`` field counts from.
    """

    def __init__(self, run: RunDir, *, start_time: float | None = None) -> None:
        self.start_time = time.monotonic() if start_time is None else start_time
        self._run = run
        self._metrics, self._samples = Lines(run.metrics), Lines(run.samples)
        self._layers: Lines | None = None  # made with its first line, as not every run has one
        self.latest: dict[str, float] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics; a non-finite number is written as a string, as JSON has none."""
        self.latest.update(values)
        self._metrics.append({"step": step, "time": round(time.monotonic() - self.start_time, 3), **values})

    def sample(self, sample: Sample) -> None:
        """One line of samples.jsonl."""
        self._samples.append(sample.row())

    def layers(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """A line of layers.jsonl for each layer."""
        try:
            self._layers = self._layers or Lines(self._run.layers)
        except OSError as error:
            print(
                f"warning: layers.jsonl cannot be made ({error.strerror}): this step's lines are lost",
                file=sys.stderr,
            )
            return
        for row in rows:
            self._layers.append({"step": step, **row})

    def forget_after(self, step: int) -> None:
        """Remove the lines of steps a resumed run will do again, so that no step stands there twice."""
        self.close()
        for path in (self._run.metrics, self._run.samples, self._run.layers):
            if not path.exists():
                continue
            kept = []
            # Not splitlines(): U+2028 and its like may stand inside a JSON string.
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                    row = json.loads(line)
                    if row["step"] <= step:
                        kept.append(line + b"\n")
                        if path == self._run.metrics:
                            self.latest.update({k: v for k, v in row.items() if k not in ("step", "time")})
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)
        self._metrics, self._samples = Lines(self._run.metrics), Lines(self._run.samples)

    def close(self) -> None:
        """Close the files."""
        for lines in (self._metrics, self._samples, self._layers):
            if lines is not None:
                lines.close()
        self._layers = None
