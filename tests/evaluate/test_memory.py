"""Peak memory is what was held at once, above what was held before."""

from __future__ import annotations

import pytest
import torch

from saccade.evaluate import memory
from saccade.evaluate.memory import Peak

MB = 2**20


def test_the_peak_of_two_buffers_of_which_one_is_gone() -> None:
    meter = Peak(torch.device("cpu"))
    held = torch.ones(64 * MB, dtype=torch.uint8)
    for _ in range(2):  # the second time nothing is hidden by pages that were used before
        meter.start()
        first = torch.ones(48 * MB, dtype=torch.uint8)
        second = first + 1
        del first, second
        peak = meter.stop()
        if peak is None:
            pytest.skip("this system does not allow the peak to be reset")
        # both buffers; the process's other pages come and go by a few MB
        assert 88 * MB < peak < 112 * MB
    assert held[0] == 1


def test_where_it_can_not_be_measured_it_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    meter = Peak(torch.device("cpu"))
    meter.start()
    assert meter.stop() is None


@pytest.mark.gpu
def test_the_gpu_peak_is_the_allocators() -> None:
    meter = Peak(torch.device("cuda"))
    meter.start()
    block = torch.ones(64 * MB, dtype=torch.uint8, device="cuda")
    del block
    assert meter.stop() == 64 * MB
