"""What takes too long is given up, and the alarm is gone afterwards."""

from __future__ import annotations

import signal
import time

import pytest

from saccade.evaluate.patience import TookTooLong, within


def test_work_that_takes_too_long_is_stopped():
    with pytest.raises(TookTooLong, match=r"longer than the 0.05 s"), within(0.05):
        while True:
            time.sleep(0.01)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_work_in_time_is_left_alone():
    with within(5):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with within(None):
        pass
