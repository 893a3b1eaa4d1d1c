"""Checkpoints under crashes and full disks: real deaths of real processes, at every stage of a save."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmlab import journal
from lmlab.journal import beside, publish_folder, remove_leftovers
from lmlab.records import UserError
from lmlab.training import checkpoint as saving
from lmlab.training.checkpoint import (
    FolderCheckpointIO,
    checkpoint_name,
    newest_checkpoint,
    verify_checkpoint,
)

OFFSETS = range(20)
Fault = Callable[[pytest.MonkeyPatch, int, Path], None]


def state(step: int, *, size: int = 3000) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"global_step": step, "state_dict": {"w": torch.randn(size, generator=generator)}}


def save(folder: Path, step: int, **told: Any) -> Path:
    path = folder / checkpoint_name(step)
    FolderCheckpointIO().save_checkpoint(state(step, **told), path)
    return path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(work: Callable[[], None]) -> int:
    """The signal that ``work`` died of in a process of its own; 0: it came to its end."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed in another way"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


# --- where a save can die ---------------------------------------------------------------------------------------------


def while_the_state_is_written(patch: pytest.MonkeyPatch, offset: int, folder: Path) -> None:
    """The system kills the process at that very byte of the file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = offset * 12_000 // len(OFFSETS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def while_the_manifest_is_written(patch: pytest.MonkeyPatch, offset: int, folder: Path) -> None:
    def torn(path: Path, text: str, **told: Any) -> int:
        with path.open("wb") as stream:
            stream.write(text.encode()[: len(text) * offset // len(OFFSETS)])
            stream.flush()
            die()
        return 0

    patch.setattr(Path, "write_text", torn)


def before_something_is_on_the_disk(patch: pytest.MonkeyPatch, offset: int, folder: Path) -> None:
    calls = iter(range(100))
    own = journal.sync_to_disk
    patch.setattr(journal, "sync_to_disk", lambda path: die() if next(calls) == offset % 4 else own(path))


def between_the_two_renames(patch: pytest.MonkeyPatch, offset: int, folder: Path) -> None:
    own = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp") and not path.name.startswith(".manifest"):
            die()
        return own(path, target)

    patch.setattr(Path, "rename", rename)


def after_the_rename(patch: pytest.MonkeyPatch, offset: int, folder: Path) -> None:
    own = journal.sync_to_disk
    patch.setattr(journal, "sync_to_disk", lambda path: die() if path == folder else own(path))


def while_the_replaced_one_is_removed(patch: pytest.MonkeyPatch, offset: int, folder: Path) -> None:
    def remove(path: Any, **told: Any) -> None:
        files = sorted(Path(path).iterdir()) if Path(path).exists() else []
        for file in files[: offset % 3]:
            file.unlink()
        if files:
            die()

    patch.setattr(journal.shutil, "rmtree", remove)


FAULTS: list[Fault] = [
    while_the_state_is_written,
    while_the_manifest_is_written,
    before_something_is_on_the_disk,
    between_the_two_renames,
    after_the_rename,
    while_the_replaced_one_is_removed,
]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_kill_9_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, offset: int
) -> None:
    """Two whole ones are there; a third is made anew in the place of the second, or after it."""
    folder = tmp_path / "checkpoints"
    replaced = fault in (between_the_two_renames, while_the_replaced_one_is_removed)
    kept = [save(folder, step) for step in ((1, 2, 3) if replaced else (1, 2))]
    before = {path.name: (path / "state.pt").read_bytes() for path in kept}

    def dying() -> None:
        with pytest.MonkeyPatch.context() as patch:
            fault(patch, offset, folder)
            save(folder, 3, size=3000 + 50 * offset)

    assert in_a_child(dying) in (signal.SIGKILL, signal.SIGXFSZ)
    remove_leftovers(folder)
    found = newest_checkpoint(folder)
    assert found is not None
    expected = 3 if replaced or fault is after_the_rename else 2
    assert found.name == checkpoint_name(expected)
    loaded = FolderCheckpointIO().load_checkpoint(found)
    size = len(loaded["state_dict"]["w"])
    assert torch.equal(loaded["state_dict"]["w"], state(expected, size=size)["state_dict"]["w"])
    for name in (checkpoint_name(1), checkpoint_name(2)):
        assert (folder / name / "state.pt").read_bytes() == before[name], "an older one was touched"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], (
        "something half made stayed"
    )
    save(folder, 4)  # and the run goes on
    assert newest_checkpoint(folder) == folder / checkpoint_name(4)


# --- disks that take nothing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Beyond ``size`` bytes a write fails, as on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5_000, 11_000])
def test_a_disk_that_takes_nothing_costs_that_checkpoint_only(tmp_path: Path, size: int) -> None:
    old = save(tmp_path, 1)
    writer = FolderCheckpointIO(on_error="warn")
    with files_of_at_most(size):
        writer.save_checkpoint(state(2), tmp_path / checkpoint_name(2))
    assert isinstance(writer.failed, OSError)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    verify_checkpoint(old)
    writer.save_checkpoint(state(3), tmp_path / checkpoint_name(3))
    assert writer.failed is None
    assert newest_checkpoint(tmp_path) == tmp_path / checkpoint_name(3)
    with files_of_at_most(size), pytest.raises(OSError):
        FolderCheckpointIO().save_checkpoint(state(4), tmp_path / checkpoint_name(4))


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(torch, "save", lambda *told: pytest.fail("it was written"))
    writer = FolderCheckpointIO(on_error="warn")
    writer.save_checkpoint(state(1), tmp_path / checkpoint_name(1))
    assert writer.failed is not None
    assert "MB free" in str(writer.failed)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "gone"])
def test_damage_is_found_and_the_older_one_taken(tmp_path: Path, file: str, damage: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    path = newer / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":  # a digit of a hash or a bit of a weight
        place = content.index(b'"sha256"') + 15 if file == "manifest.json" else len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes(content[:-100] if damage == "cut" else content + b"x")
    assert newest_checkpoint(tmp_path) == older
    with pytest.raises(UserError, match="checkpoint"):
        FolderCheckpointIO().load_checkpoint(newer)


def test_the_newest_is_by_step_and_not_by_clock(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    os.utime(tmp_path / checkpoint_name(9), (4e9, 4e9))
    os.utime(tmp_path / checkpoint_name(100), (1, 1))
    assert newest_checkpoint(tmp_path) == tmp_path / checkpoint_name(100)


def test_what_a_checkpoint_holds_is_never_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / checkpoint_name(1)
    FolderCheckpointIO().save_checkpoint({**state(1), "hyper_parameters": Payload()}, path)
    with pytest.raises(UserError, match="holds code"):
        FolderCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


# --- folders by rename ------------------------------------------------------------------------------------------------


def test_leftovers_go_and_what_was_being_replaced_comes_back(tmp_path: Path) -> None:
    for name in (".adapter.77.tmp", ".adapter.77.old", ".step-00000003.5.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / ".summary.json.5.tmp").write_text("{")
    for name in (".lock.77.tmp", ".lock", ".hidden", ".a.tmp"):
        (tmp_path / name).write_text("other")
    remove_leftovers(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter", "step-00000003", ".lock.77.tmp", ".lock", ".hidden", ".a.tmp"}
    assert (tmp_path / "adapter" / "file").read_text() == ".adapter.77.old"
    remove_leftovers(tmp_path / "absent")


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        made = beside(target, "tmp")
        (made / "sub").mkdir(parents=True)
        (made / "sub" / "file").write_text(content)
        publish_folder(made, target)
        assert (target / "sub" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
