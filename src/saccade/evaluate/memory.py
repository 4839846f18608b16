"""Peak memory of a piece of work: the allocator's own count on a GPU, the process's peak resident size on Linux."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """Bytes by which memory rises above what was held at `start`, at its highest.

    On a GPU: torch's allocated bytes. On a CPU: the resident size of the process, whose high-water mark is reset at the
    start and whose free pages are first given back to the system; so spare room that an allocator keeps from earlier
    work is not hidden. Collect garbage before. None where the system does not allow that (anything but Linux, or a
    locked-down container).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._base: int | None = None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
            return
        self._base = None
        if self.device.type == "cpu":
            _give_back()
            if _reset_high_water():
                self._base = _resident("VmRSS")

    def stop(self) -> int | None:
        """Bytes at the peak above the start, or None where it can't be measured."""
        if self._base is None:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._base
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._base)


def _reset_high_water() -> bool:
    """Make the peak resident size equal the current one; False where that is not permitted."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """A size in bytes from the process's status file."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


@lru_cache(maxsize=1)
def _allocator() -> ctypes.CDLL | None:
    """The C library, where it can give free memory back (glibc)."""
    with suppress(OSError):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            return library
    return None


def _give_back() -> None:
    library = _allocator()
    if library is not None:
        library.malloc_trim(0)
