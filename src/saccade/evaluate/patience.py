"""A limit on how long a piece of work may take, so that one slow method does not cost the others their figures."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TookTooLong(ValueError):
    """The time was over before the work was done."""


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Raise TookTooLong inside the block after so many seconds, between two steps of Python; None for no limit.

    It needs the alarm of a POSIX system and the main thread; elsewhere there is no limit.
    """
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TookTooLong(f"it took longer than the {seconds:g} s of --patience")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
