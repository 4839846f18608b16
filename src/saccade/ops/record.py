"""What ran: every op notes its implementation and density, so that nothing falls back in silence."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from saccade.core import Selection


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """op: "attend" or "decode". impl: the implementation that ran. n_q, n_k, heads: the problem. device, dtype as strings."""

    op: str
    impl: str
    n_q: int
    n_k: int
    heads: int
    device: str
    dtype: str
    selection: Selection | None = None

    @property
    def density(self) -> float:
        """Score pairs computed / pairs visible; 1 for dense."""
        return 1.0 if self.selection is None else self.selection.density()


_local = threading.local()


def note(run: LastRun) -> None:
    _local.run = run


def last_run() -> LastRun:
    """The last attend or decode call of this thread. ValueError when there was none."""
    run = getattr(_local, "run", None)
    if run is None:
        raise ValueError("no attention has run in this thread yet: call attend, decode or an attached model first")
    return run
