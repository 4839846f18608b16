"""A tensor that grows along one axis without being copied at every step."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 64  # entries of room made at a time, at least
SHARE = 64  # and one for so many entries held, so that copying costs at most SHARE entries for each one added


class Growing:
    """`(B, H, n, ...)` growing along axis 2. `view` is the content; the buffer behind it has room for more entries."""

    def __init__(self, content: Tensor, room: int = 0) -> None:
        self.n = content.shape[2]
        self._buffer = content
        if room:
            self._reserve(self.n + room)

    @property
    def view(self) -> Tensor:
        return self._buffer[:, :, : self.n]

    @property
    def nbytes(self) -> int:
        """Bytes held, the spare room included."""
        return self._buffer.untyped_storage().nbytes()

    def reserve(self, more: int) -> None:
        """Make room for so many entries more."""
        self._reserve(self.n + more)

    def _reserve(self, wanted: int) -> None:
        if wanted <= self._buffer.shape[2] and self._buffer.is_contiguous():
            return
        room = max(wanted, self.n) + max(STEP, wanted // SHARE)
        shape = (*self._buffer.shape[:2], room, *self._buffer.shape[3:])
        bigger = self._buffer.new_empty(shape)
        bigger[:, :, : self.n] = self.view
        self._buffer = bigger

    def append(self, new: Tensor) -> Tensor:
        """Add `(B, H, m, ...)` at the end; returns the whole content."""
        buffer, at = self.extend(new.shape[2])
        buffer[:, :, at : at + new.shape[2]] = new
        return self.view

    def extend(self, m: int) -> tuple[Tensor, int]:
        """Count m entries more, which the caller writes: the buffer they belong in, contiguous, and where they begin."""
        self._reserve(self.n + m)
        self.n += m
        return self._buffer, self.n - m

    def room(self, m: int) -> Tensor:
        """The m entries behind the content, to be written before they are counted."""
        buffer, at = self.extend(m)
        self.n -= m
        return buffer[:, :, at : at + m]

    def truncate(self, n: int) -> None:
        """Keep the first n entries."""
        self.n = min(self.n, n)

    def stored_fields(self) -> dict[str, object]:
        """The content without the spare room, to be saved."""
        return {"n": self.n, "_buffer": self.view}

    def reorder(self, rows: Tensor) -> Growing:
        """A copy with these batch rows."""
        return Growing(self.view.index_select(0, rows.to(self._buffer.device)))

    def pick(self, indices: Tensor) -> Tensor:
        """Entries `indices (B, H, m)` of every row and head, `(B, H, m, ...)`, a copy."""
        rest = self._buffer.shape[3:]
        index = indices.reshape(*indices.shape, *(1,) * len(rest)).expand(*indices.shape, *rest)
        return torch.gather(self.view, 2, index)
