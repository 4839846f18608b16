"""A growing tensor that gives up entries near its front at the cost of the few that stand before them."""

from __future__ import annotations

from torch import Tensor

from saccade.parts.growing import SHARE, STEP, Growing

LEAST = 8  # entries of room, at least


class Sliding(Growing):
    """`(B, H, n, ...)`, growing along axis 2, whose content begins `begin` entries into the buffer.

    To drop entries behind the first few, those few are written anew just in front of what stays, and the content begins later: a window
    that moves on by one token moves its sinks and nothing else. The buffer is written anew only when its room is used up.
    alone: whether nothing else reads the buffer, so that entries may be moved in it.
    """

    def __init__(self, content: Tensor) -> None:
        super().__init__(content)
        self.begin, self.alone = 0, False

    @property
    def view(self) -> Tensor:
        return self._buffer[:, :, self.begin : self.begin + self.n]

    def _reserve(self, wanted: int) -> None:
        if self.begin + wanted > self._buffer.shape[2] or not self._buffer.is_contiguous():
            self._renew(wanted + _room(wanted), [self.view])

    def _renew(self, size: int, pieces: list[Tensor]) -> None:
        """A buffer of its own for `size` entries, which begins with these pieces, one after the other."""
        buffer, at = self._buffer.new_empty((*self._buffer.shape[:2], size, *self._buffer.shape[3:])), 0
        for piece in pieces:
            buffer[:, :, at : at + piece.shape[2]] = piece
            at += piece.shape[2]
        self._buffer, self.begin, self.alone, self.n = buffer, 0, True, at

    def extend(self, m: int) -> tuple[Tensor, int]:
        buffer, at = super().extend(m)
        return buffer, self.begin + at

    def drop(self, begin: int, count: int) -> None:
        """Drop the entries begin ... begin + count - 1: in place, or, where the buffer is much too large, into one without room."""
        old, n = self.view, self.n - count
        if not self.alone or self._buffer.shape[2] > n + 2 * _room(n):
            self._renew(n, [old[:, :, :begin], old[:, :, begin + count :]])
            return
        # the old and the new place of the first entries may overlap
        first = old[:, :, :begin].clone()
        self.begin, self.n = self.begin + count, n
        self._buffer[:, :, self.begin : self.begin + begin] = first

    def stored_fields(self) -> dict[str, object]:
        return {**super().stored_fields(), "begin": 0, "alone": False}

    def __copy__(self) -> Sliding:
        """Another one over the same buffer: from now on neither moves entries in it."""
        new = type(self).__new__(type(self))
        self.alone = False
        vars(new).update(vars(self))
        return new


def _room(n: int) -> int:
    """Spare entries beside n: as in other growing tensors, and less where there are few entries, which are soon copied."""
    return max(LEAST, min(STEP, n // 8), n // SHARE)
