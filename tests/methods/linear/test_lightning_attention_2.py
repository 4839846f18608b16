"""lightning-attention-2: the same layer as lightning-attention, tiled."""

from __future__ import annotations

import time

import pytest
import torch

import saccade
from saccade.ops.scan import chunked
from saccade.ops.scan.problem import check


def test_it_is_lightning_attention_tiled():
    torch.manual_seed(0)
    x = torch.randn(2, 200, 64, dtype=torch.float64)
    first = saccade.mixer("lightning-attention", dim=64, heads=4, layer=1, layers=6).double()
    for form in ("tiled", "token"):
        second = saccade.mixer(f"lightning-attention-2(form={form!r})", dim=64, heads=4, layer=1, layers=6).double()
        second.load_state_dict(first.state_dict())
        assert (first(x)[0] - second(x)[0]).abs().max() < 1e-11


def test_the_size_of_a_tile_changes_nothing():
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 4, 150, 16, dtype=torch.float64) for _ in range(3))
    decay = -torch.tensor([0.0, 0.01, 0.3, 2.0], dtype=torch.float64)
    problem = check(q, k, v, decay, None, None, 1.0, None, None)
    outs = [chunked.scan(problem, chunk) for chunk in (1, 16, 64, 256)]
    for out, state in outs[1:]:
        assert (out - outs[0][0]).abs().max() < 1e-12 and (state - outs[0][1]).abs().max() < 1e-12


def test_a_wrong_form_is_refused():
    with pytest.raises(ValueError, match="is not 'tiled' or 'token'"):
        saccade.mixer("lightning-attention-2(form='loop')", dim=64, heads=4)


@pytest.mark.slow
def test_tokens_per_second_stay_the_same_at_a_fixed_number_of_tokens():
    layer = saccade.mixer("lightning-attention-2", dim=256, heads=4)

    def seconds(batch: int, n: int) -> float:
        x, best = torch.randn(batch, n, 256), float("inf")
        with torch.no_grad():
            for _ in range(3):
                begin = time.perf_counter()
                layer(x)
                best = min(best, time.perf_counter() - begin)
        return best

    assert 0.6 < seconds(16, 1024) / seconds(1, 16384) < 1.6
