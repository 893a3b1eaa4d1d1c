"""The memory a piece of torch code takes, found by running it without memory.

Under `Footprint` every floating-point tensor, and everything that is put on a device, is one of torch's fake tensors:
shape, type and device without content, so an 8B model is built in seconds and its training step runs without
arithmetic. The mode follows each storage from its creation to its end and so knows the live bytes at any moment, by
what they are for. Integer tensors on the CPU stay real: where documents lie is read from them.

torch's own `MemTracker` (torch.distributed._tools) does the same with per-module statistics, at about three times the
overhead per operation; this one knows phases and marks instead.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmlab.models.memory import KEPT_BELOW

CUDA_GRANULE = 512
"""Bytes that sizes are rounded up to by torch's CUDA allocator (kMinBlockSize)."""

_DEVICE: Any = torch.ops.prim.device.default
_FLOATING_BY_DEFAULT = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "zeros", "ones", "rand", "randn", "linspace", "eye")
)


class Footprint(TorchDispatchMode):
    """Counts live bytes of fake tensors while it is active; enter it by `active`.

    Args:
        granule: sizes are rounded up to a multiple of it.
        keeps_below: blocks from this size on go back to the system when they are freed.

    Attributes:
        kind: what storages made from now on are for (``weights``, ``activations``, ...).
        mark: name of the stretch of work now going on; none, and no peak is kept.
        live: bytes alive, by kind.
        peaks: mark -> ``live`` at that stretch's highest total.
        heap: mark -> the most bytes alive in ``small`` and, apart from that, in ``large`` blocks of malloc.
    """

    def __init__(self, *, granule: int = 1, keeps_below: int = KEPT_BELOW) -> None:
        super().__init__()
        self.granule, self.keeps_below, self.kind = granule, keeps_below, "weights"
        self.live: Counter[str] = Counter()
        self.peaks: dict[tuple[Any, ...], Counter[str]] = {}
        self.heap: dict[tuple[Any, ...], Counter[str]] = {}
        self._large = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._total = self._best = 0
        self._storages: dict[int, tuple[str, int, Any]] = {}
        self._mark: tuple[Any, ...] = ()

    @contextmanager
    def active(self) -> Iterator[Footprint]:
        """Run a block in fake tensors. No random number is used up, whatever the block draws."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _take_over))
            stack.enter_context(self._fake)
            stack.enter_context(self)
            yield self

    @property
    def mark(self) -> tuple[Any, ...]:
        """See the class."""
        return self._mark

    @mark.setter
    def mark(self, name: tuple[Any, ...]) -> None:
        self._mark = name
        self._best = self.peaks[name].total() if name in self.peaks else -1
        self._note_peak()

    @property
    def blocks(self) -> Counter[str]:
        """Bytes alive in ``small`` and in ``large`` blocks of malloc."""
        return Counter({"small": self._total - self._large, "large": self._large})

    def assign(self, tensor: torch.Tensor, kind: str) -> None:
        """Say what an existing tensor is for."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            old, size, reference = self._storages[key]
            self.live[old] -= size
            self.live[kind] += size
            self._storages[key] = (kind, size, reference)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # every second call is this one
        if _is_fake_call(func, args, kwargs):
            out = func(*args, **kwargs)
            if isinstance(out, FakeTensor):
                self._follow(out)
            else:
                for tensor in tree_leaves(out):
                    if isinstance(tensor, FakeTensor):
                        self._follow(tensor)
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        self._storages[key] = (self.kind, size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live[self.kind] += size
        self._total += size
        self._large += size if size >= self.keeps_below else 0
        self._note_peak()

    def _forget(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key)
        self.live[kind] -= size
        self._total -= size
        self._large -= size if size >= self.keeps_below else 0

    def _note_peak(self) -> None:
        if not self._mark:
            return
        if self._total > self._best:
            self._best = self._total
            self.peaks[self._mark] = self.live.copy()
        heap = self.heap.setdefault(self._mark, Counter())
        heap["large"] = max(heap["large"], self._large)
        heap["small"] = max(heap["small"], self._total - self._large)


def _take_over(one: torch.Tensor, other: torch.Tensor) -> None:
    """In place of `torch.utils.swap_tensors`, by which `Module.to` changes fake parameters.

    It refuses parameters that are weakly referenced, as all of a module are.
    """
    one.data = other.data


def is_fake(module: torch.nn.Module) -> bool:
    """Whether a model has no weights but only their shapes."""
    return any(isinstance(p, FakeTensor) or p.device.type == "meta" for p in module.parameters())


def _is_fake_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if args and isinstance(args[0], FakeTensor):
        return True
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return True
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if device is not None and torch.device(device).type != "cpu":
        return True
    if tensors:
        return False
    if dtype is None:
        return func.overloadpacket in _FLOATING_BY_DEFAULT
    return dtype.is_floating_point
