"""An export's directory: plain Hugging Face layout, made beside its place and renamed when it is whole.

Nothing in it names a path of the machine that it was made on, and an export that was interrupted leaves nothing under
its final name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmlab.export.certificate import NAME, read_certificate
from lmlab.journal import LEFTOVER, beside, publish_folder, read_json, write_json
from lmlab.records import UserError

TEXT_FILES = {".json", ".md", ".jinja", ".txt", ""}
OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "_from_model_config")
"""Fields by which transformers remembers where something was loaded from."""


def check_target(to: Path, *, run: Path, overwrite: bool) -> None:
    """Refuse a place before anything is loaded.

    Raises:
        UserError: inside the run or around it, taken, not an earlier export (with ``overwrite``), or not writable.
    """
    target, inside = to.resolve(), run.resolve()
    if target == inside or inside in target.parents or target in inside.parents:
        raise UserError(
            "an export does not go into a run's directory or around it",
            where=str(to),
            fix="name a directory beside it",
        )
    if os.path.lexists(to) and not to.is_dir():
        raise UserError("not a directory", where=str(to), fix="name another with --to")
    if to.is_dir() and any(to.iterdir()):
        if not overwrite:
            raise UserError(
                "the directory is not empty", where=str(to), fix="name another, or use --overwrite"
            )
        if not (to / NAME).is_file():
            raise UserError(
                f"not an export (no {NAME}), so not overwritten", where=str(to), fix="name another with --to"
            )
        _check_all_certified(to)
    parent = next((p for p in target.parents if p.exists()), None)
    if parent is None or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("cannot be written to", where=str(parent or to), fix="name another with --to")


def _check_all_certified(to: Path) -> None:
    """Refuse to delete what no export wrote, hidden files too: a clone's .git is somebody's work.

    Raises:
        UserError: certificate.json is another program's or damaged, or a file is there that it does not list.
    """
    known = {NAME, *read_certificate(to)["files"]}
    there = (path for path in sorted(to.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = next(
        (name for name in (path.relative_to(to).as_posix() for path in there) if name not in known), None
    )
    if foreign is not None:
        raise UserError(
            f"{foreign} is not part of the export there, so nothing is overwritten",
            where=str(to),
            fix="move it away, or name another directory with --to",
        )


@contextmanager
def made_beside(to: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``to`` at the end of the block; on any error nothing of it stays.

    Of a link its target is replaced, and the link stays one.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError

    to = to.resolve()
    temporary = beside(to, "tmp")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        _clear_dead(to)
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, to)
    except OSError as error:
        if error.errno is None:  # transformers raises it bare for whatever it cannot load
            raise
        raise _unwritable(error.strerror or str(error), to) from error
    except SafetensorError as error:  # how that library says that the disk is full
        if "No space" not in str(error) and "Io" not in str(error):
            raise
        raise _unwritable(
            os.strerror(errno.ENOSPC) if "No space" in str(error) else str(error), to
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(reason: str, to: Path) -> UserError:
    return UserError(
        f"the export cannot be written: {reason}",
        where=str(to),
        fix="make room, or name another place with --to",
    )


def _clear_dead(to: Path) -> None:
    """Remove what an export to the same place left behind when it was killed."""
    for path in to.parent.glob(f".{to.name}.*"):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or match["name"] != to.name:
            continue
        pid = int(path.name.split(".")[-2])
        if match["ending"] == "old" and not to.exists():
            path.rename(to)
        elif not _lives(pid):
            shutil.rmtree(path, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_model(
    folder: Path, model: Any, tokenizer: Any, *, eos_token_ids: Collection[int], info: dict[str, Any]
) -> None:
    """model.safetensors (in shards if large), config, tokenizer, chat template, generation config, lmlab.json.

    Args:
        eos_token_ids: all that end a text, so that other programs stop where lmlab does.
        info: what lmlab.json is to hold; no path of this machine may be in it.

    Raises:
        UserError: a weight that is not finite in the type of ``model``.
    """
    check_finite(model)
    generation = model.generation_config
    generation.eos_token_id = sorted(eos_token_ids) or None
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    if not generation.do_sample:  # values that only sampling reads would be refused when it is saved
        generation.temperature = generation.top_p = generation.top_k = None
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer)
    for name in ("config.json", "generation_config.json"):
        forget_machine(folder / name)
    write_json(folder / "lmlab.json", info)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's files, without where it was loaded from."""
    tokenizer.save_pretrained(folder)
    forget_machine(folder / "tokenizer_config.json")


def forget_machine(path: Path) -> None:
    """Take what transformers remembers of this machine out of a JSON file."""
    values = read_json(path)
    if any(name in values for name in OF_THIS_MACHINE):
        kept = {name: value for name, value in values.items() if name not in OF_THIS_MACHINE}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_finite(model: Any) -> None:
    """Refuse weights that 16 bits turned into infinity.

    Raises:
        UserError: naming the first of them.
    """
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} is not finite in {dtype}",
                where="--dtype",
                fix="use bf16, whose range is fp32's, or fp32",
            )


ABSOLUTE = re.compile(r"(?<![\w.:/~$}*-])/(?:home|root|Users|tmp|mnt|scratch|work|workspace)/\w[\w./+-]*")
"""Where people's files lie; /usr/bin and the like stand in templates and prompts too."""


WHOLE = r"(?:(?<![\w.:~/-])|(?<=file://))(?:{})(?![\w-]|\.\w)"
"""A path itself or what lies in it: not the end of scripts/export.py where /export.py is meant, nor /exports for /export."""


def check_portable(folder: Path, known: Collection[str]) -> None:
    """Refuse an export with a path of this machine in one of its text files (the tokenizer's vocabulary aside).

    Args:
        known: absolute paths that must not be there in any case (the run, its base); relative ones name no machine.

    Raises:
        UserError: naming the file and the path.
    """
    absolute = sorted(re.escape(p.rstrip("/")) for p in known if os.path.isabs(p) and len(p) > 1)
    named = re.compile(WHOLE.format("|".join(absolute))) if absolute else None
    for path in sorted(folder.rglob("*")):
        if path.suffix not in TEXT_FILES or not path.is_file() or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        match = named.search(text) if named else None
        found = match[0] if match else next((m for m in ABSOLUTE.findall(text) if Path(m).exists()), None)
        if found:
            raise UserError(
                f"{path.name} names a path of this machine, {found}",
                where=str(folder.name),
                fix="rename what holds it (run_name, --base-name), or report it as a bug",
            )
