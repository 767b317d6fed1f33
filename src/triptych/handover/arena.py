"""Memory that is registered once, and who has which part of it."""

from __future__ import annotations

import ctypes
import mmap
import threading
from bisect import bisect_left
from collections import deque
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch

from triptych.contract import ITEM_ALIGNMENT, aligned

Memory = Literal["host", "cuda"]
_HUGE_PAGE = 2 << 20
_AHEAD = 64 << 20
"""Bytes that have pages before somebody takes them."""
_MADV_POPULATE_WRITE = 23
"""From <linux/mman.h>, since Linux 5.14. What others write there meanwhile stays."""


class Allocator:
    """Hands out parts of a range of bytes; first fit, and neighbours grow together again.

    First fit, so that the low part is used over and over and the rest is never touched. What is
    free is a list sorted by offset: a binary search where a part is given back, a scan where one
    is taken, which is some 20 µs for a thousand holes.

    Args:
        capacity: Bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        """Bytes handed out."""
        self._starts = [0]
        self._ends = [capacity]
        self._taken: dict[int, int] = {}

    def take(self, nbytes: int) -> int | None:
        """The offset of a part of at least ``nbytes``, aligned; None: no hole is large enough."""
        size = max(aligned(nbytes), ITEM_ALIGNMENT)
        for place, start in enumerate(self._starts):
            if self._ends[place] - start >= size:
                break
        else:
            return None
        if self._ends[place] == start + size:
            del self._starts[place], self._ends[place]
        else:
            self._starts[place] += size
        self._taken[start] = start + size
        self.used += size
        return start

    def give(self, start: int) -> None:
        """Give back the part at an offset that `take` returned.

        Raises:
            KeyError: It is not taken.
        """
        end = self._taken.pop(start)
        self.used -= end - start
        place = bisect_left(self._starts, start)
        before = place > 0 and self._ends[place - 1] == start
        after = place < len(self._starts) and self._starts[place] == end
        if before and after:
            self._ends[place - 1] = self._ends.pop(place)
            del self._starts[place]
        elif before:
            self._ends[place - 1] = end
        elif after:
            self._starts[place] = start
        else:
            self._starts.insert(place, start)
            self._ends.insert(place, end)

    @property
    def holes(self) -> int:
        """Number of parts that are free; 1 when all is, 0 when nothing is."""
        return len(self._starts)


class Arena:
    """One stretch of memory with an `Allocator` over it. Any thread may call.

    Args:
        capacity: Bytes.
        device: The CPU's memory in pages as large as may be, which a copy by the kernel takes a
            third of the time for, and found before they are needed; or a GPU's.
    """

    def __init__(self, capacity: int, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self.memory: Memory = "cuda" if device.type == "cuda" else "host"
        self.device_id = device.index or 0
        if self.memory == "host":
            self.tensor = torch.from_numpy(_pages(capacity))
        else:
            # Not from an expandable segment, which CUDA IPC cannot share; the caller's to see to.
            self.tensor = torch.empty(capacity, dtype=torch.uint8, device=device)
        self.address: int = self.tensor.data_ptr()
        self._allocator = Allocator(capacity)
        self._lock = threading.Lock()
        self._returned: deque[tuple[int, Any]] = deque()
        self._touched = 0 if self.memory == "host" else capacity
        self._touch(0)

    @property
    def capacity(self) -> int:
        """Bytes."""
        return self._allocator.capacity

    @property
    def used(self) -> int:
        """Bytes that are lent."""
        with self._lock:
            self._collect()
            return self._allocator.used

    def take(self, nbytes: int) -> int | None:
        """The offset of ``nbytes``, until they are given back; None: there is no room now."""
        with self._lock:
            self._collect()
            offset = self._allocator.take(nbytes)
            if offset is not None:
                self._touch(offset + nbytes)
            return offset

    def give(self, offset: int) -> None:
        """Give back what `take` lent.

        A GPU's memory is lent again only when all work is done that this thread had queued there
        before: what comes over the network or from another process is in no stream.
        """
        done = None
        if self.memory == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.tensor.device))
        # Also called by the garbage collector, maybe within `take`: so no lock here.
        self._returned.append((offset, done))

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes there, uint8, shape (nbytes,)."""
        return self.tensor[offset : offset + nbytes]

    def lend(self, offset: int, nbytes: int) -> torch.Tensor:
        """As `view`, and the bytes are given back when the last tensor on them is gone."""
        return _Loan(self, offset, nbytes).tensor()

    def _touch(self, end: int) -> None:
        """Have the kernel find pages, in a thread, for what may be taken after ``end``.

        Whoever writes first to a huge page waits for it: milliseconds, several times a copy.
        """
        if min(end + _AHEAD // 2, self.capacity) > self._touched:
            start, self._touched = self._touched, min(end + _AHEAD, self.capacity)
            threading.Thread(
                target=_populate, args=(self.tensor, start, self._touched), daemon=True
            ).start()

    def _collect(self) -> None:
        for _ in range(len(self._returned)):
            offset, done = self._returned.popleft()
            if done is None or done.query():
                self._allocator.give(offset)
            else:
                self._returned.append((offset, done))


class _Loan:
    """The owner, in numpy's and torch's eyes, of a part of an arena."""

    def __init__(self, arena: Arena, offset: int, nbytes: int) -> None:
        self._arena = arena
        self._offset = offset
        self._interface = {
            "data": (arena.address + offset, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._arena.give(self._offset)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """https://numpy.org/doc/stable/reference/arrays.interface.html."""
        if self._arena.memory == "cuda":
            raise AttributeError
        return self._interface

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html."""
        if self._arena.memory == "host":
            raise AttributeError
        return self._interface

    def tensor(self) -> torch.Tensor:
        if self._arena.memory == "host":
            return torch.from_numpy(np.asarray(self))
        return torch.as_tensor(self, device=self._arena.tensor.device)


def _populate(memory: torch.Tensor, start: int, end: int) -> None:
    """Find pages for a part of ``memory``; older kernels do when they are written to."""
    madvise = ctypes.CDLL(None).madvise
    for first in range(start // _HUGE_PAGE * _HUGE_PAGE, end, _HUGE_PAGE):
        length = min(_HUGE_PAGE, memory.numel() - first)
        place = ctypes.c_void_p(memory.data_ptr() + first)
        if madvise(place, ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
            return


def _pages(capacity: int) -> Any:
    """Anonymous memory, none of it touched yet, as an array of uint8."""
    length = -(-capacity // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)[:capacity]
