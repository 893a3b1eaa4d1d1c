"""How much memory each phase of a run took.

On a GPU: the peak of torch's allocator since the phase began. On a CPU: the process's peak resident set, which Linux
keeps as VmHWM and resets when ``5`` is written to /proc/self/clear_refs; where that is not possible the resident set
at the phase's end is reported instead. GB are 10^9 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

RETURNED_FROM = 1 << 20
"""Bytes of a block from which `return_freed_blocks` has it given back as soon as it is freed."""
KEPT_BELOW, KEPT_AT_END = 32 << 20, 64 << 20
"""Bytes of a block below which malloc's heap keeps it when it is freed, and of the free space that the heap may end in:
M_MMAP_THRESHOLD and M_TRIM_THRESHOLD where glibc's own adjustment ends, and where `keep_freed_blocks` has it begin."""
PHASES = ("load", "forward", "backward", "optimizer", "eval", "generate")


class MemoryMeter:
    """Peaks per phase since the last `read`; a phase is entered by `start` and lasts until the next one.

    Args:
        on_cuda: measure torch's CUDA allocator instead of the process.

    Attributes:
        base_gb: on a CPU what the process takes besides tensors, known after `plan`.
    """

    def __init__(self, *, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        self.base_gb = 0.0
        self._peaks: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._planned: dict[str, float] = {}
        self._phase: str | None = None

    def plan(self, growth_gb: Mapping[str, float], *, loaded_gb: float) -> None:
        """Take planned peaks by phase, when everything is loaded and nothing has run.

        Args:
            growth_gb: phase -> planned peak of tensors.
            loaded_gb: of them what is in memory now. On a CPU the rest of the resident set (Python, libraries) is
                added to every phase.
        """
        if not self.on_cuda:
            release_free_memory()
            self.base_gb = max(0.0, _status_gb("VmRSS") - loaded_gb)
        self._planned = {phase: self.base_gb + growth for phase, growth in growth_gb.items()}

    @property
    def planned_gb(self) -> dict[str, float]:
        """Phase -> planned peak in GB; empty where there is no plan."""
        return dict(self._planned)

    @property
    def current(self) -> str | None:
        """The phase now going on, as far as it is measured."""
        return self._phase

    def errors(self) -> dict[str, float]:
        """``memory/<phase>/plan_error``: planned growth over that of the highest measured peak so far, less 1.

        Growth is what lies above `base_gb`, which is not planned but measured. On a CPU loading is left out: it is over
        before that base is known, and imports that come later are in it.
        """
        both = self._planned.keys() & self._highest.keys() - ({"load"} if not self.on_cuda else set())
        grown = {phase: self._highest[phase] - self.base_gb for phase in sorted(both)}
        return {
            f"memory/{phase}/plan_error": (self._planned[phase] - self.base_gb) / growth - 1
            for phase, growth in grown.items()
            if growth > 0
        }

    def base(self) -> dict[str, float]:
        """``memory/base_gb``, which growth is counted from; empty while it is not known."""
        return {"memory/base_gb": self.base_gb} if self.on_cuda or self.base_gb else {}

    def start(self, phase: str | None) -> None:
        """End the current phase and begin ``phase`` (None: nothing is measured)."""
        if self._phase is not None:
            peak = self._peak()
            for peaks in (self._peaks, self._highest):
                peaks[self._phase] = max(peaks.get(self._phase, 0.0), peak)
        self._phase = phase
        if phase is not None:
            self._reset()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as ``name``; afterwards the phase before goes on."""
        before = self._phase
        self.start(name)
        try:
            yield
        finally:
            self.start(before)

    def read(self) -> dict[str, float]:
        """``memory/<phase>/peak_gb`` of the phases ended since the last call, what was planned, and the memory in use now."""
        values = {f"memory/{phase}/peak_gb": peak for phase, peak in self._peaks.items()}
        values.update({f"memory/{p}/planned_gb": self._planned[p] for p in self._peaks if p in self._planned})
        self._peaks = {}
        values["memory/rss_gb"] = _status_gb("VmRSS")
        if self.on_cuda:
            import torch

            values["memory/vram_allocated_gb"] = torch.cuda.memory_allocated() / 1e9
            values["memory/vram_reserved_gb"] = torch.cuda.memory_reserved() / 1e9
        return values

    def _peak(self) -> float:
        if self.on_cuda:
            import torch

            return torch.cuda.max_memory_allocated() / 1e9
        return _status_gb("VmHWM") or _status_gb("VmRSS")

    def _reset(self) -> None:
        if self.on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        # Not Linux, or not allowed: VmHWM then is the peak of the whole process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def release_free_memory() -> None:
    """Give memory that malloc holds free back to the system, where this is glibc; what is measured then is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def can_tune_malloc() -> bool:
    """Whether `return_freed_blocks` and `keep_freed_blocks` act: on glibc, unless the environment says what malloc is to do."""
    variables = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = variables or "mmap_threshold" in tunables or "trim_threshold" in tunables
    return platform.libc_ver()[0] == "glibc" and not told


def return_freed_blocks() -> None:
    """From now on blocks of `RETURNED_FROM` and more go back to the system when they are freed, until `keep_freed_blocks`.

    malloc's heap otherwise keeps what checkpointing frees: between the activations that stay, 22 MB a layer of a Llama of 8
    x 512 at 1,457 tokens were held where 3.5 were in use. Fresh pages cost time, a step without checkpointing about a
    quarter, so this is for runs that trade time for memory anyway. Does nothing where `can_tune_malloc` is False.
    """
    _set_malloc(mapped_from=RETURNED_FROM, kept_at_end=128 << 10)


def keep_freed_blocks() -> None:
    """From now on malloc keeps freed blocks below `KEPT_BELOW` for the next step, and up to `KEPT_AT_END` at the heap's end.

    glibc's own thresholds get there after some large blocks only; in a run of a small model they stay low, and every step
    faults in up to a thousand pages anew that the step before gave back. Does nothing where `can_tune_malloc` is False.
    """
    _set_malloc(mapped_from=KEPT_BELOW, kept_at_end=KEPT_AT_END)


def kept_by_malloc(*, checkpointing: bool) -> tuple[int, int]:
    """(size below which freed blocks stay in the heap, bytes of holes to reckon with) in a run on a CPU."""
    if not can_tune_malloc():
        return KEPT_BELOW, 0
    return (RETURNED_FROM, 0) if checkpointing else (KEPT_BELOW, KEPT_AT_END)


def _set_malloc(*, mapped_from: int, kept_at_end: int) -> None:
    if can_tune_malloc():
        ctypes.CDLL(None).mallopt(-3, mapped_from)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, kept_at_end)  # M_TRIM_THRESHOLD


def _status_gb(field: str) -> float:
    """A field of /proc/self/status in GB; elsewhere the peak resident set by `resource`."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
