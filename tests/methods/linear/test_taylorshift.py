"""taylorshift: both forms agree, and the shift stands where their costs cross, as counted and as timed."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import saccade
from saccade.parts.linear.polynomial import crossover


def layers(*forms: str, more: str = "", head_dim: int = 16):
    made = []
    for form in forms:
        torch.manual_seed(0)
        made.append(saccade.mixer(f"taylorshift(form='{form}'{more})", dim=2 * head_dim, heads=2, head_dim=head_dim).double())
    return made


@pytest.mark.parametrize("more", ["", ", bidirectional=True", ", bidirectional=True, rescale=True, a=2.0, b=0.5", ", symmetric=False"])
def test_the_factored_form_equals_the_direct_one(more: str):
    direct, factored = layers("direct", "factored", more=more)
    factored.section = 32  # several sections
    direct.rows = 40
    x = torch.randn(2, 130, 32, dtype=torch.float64)
    assert (direct(x)[0] - factored(x)[0]).abs().max() < 1e-10
    states = [layer(x)[1] for layer in (direct, factored)]
    if states[0] is not None:
        for name in ("s", "z"):
            a, b = (state.values[name] for state in states)
            assert (a - b).abs().max() < 1e-10 * a.abs().max()


def test_weights_are_a_distribution_over_normalised_keys():
    layer = layers("direct", more=", bidirectional=True")[0]
    layer.tau.data.fill_(3.0)
    x = 100 * torch.randn(1, 40, 32, dtype=torch.float64)
    call = layer.whole(x)
    q, k, v, _ = layer.project(x, {}, call)
    q, k = layer.features(q, k, call)
    assert torch.allclose(q.norm(dim=-1), torch.full((1, 2, 40), 3.0, dtype=torch.float64))
    s = q @ k.mT
    weights = 0.5 * s**2 + s + 1
    assert s.min() < -1 and weights.min() >= 0.5
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    assert (layer(x)[0] - layer.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-9
    # values that are all alike come back as they are
    assert torch.allclose(layer._direct(q, k, torch.ones_like(v), None), torch.ones_like(v))


def test_lengths_scale_what_was_read_only_where_asked():
    plain, scaled = layers("factored", more=", bidirectional=True"), layers("factored", more=", bidirectional=True, rescale=True")
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    assert (scaled[0](x)[0] - 2 * plain[0](x)[0]).abs().max() < 1e-12  # sqrt(64 / 16)


def counted(layer, n: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, n, layer.dim, dtype=torch.float64), keep=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("more", [", bidirectional=True, symmetric=False", ", bidirectional=True", ""])
@pytest.mark.parametrize("d", [8, 16, 32])
def test_the_crossover_is_where_the_counted_work_is_equal(d: int, more: str):
    """Multiplications as they run: at 0.8 of the computed length the direct form does fewer, at 1.2 the factored one."""
    auto, direct, factored = layers("auto", "direct", "factored", more=more, head_dim=d)
    direct.rows = direct.section = factored.section = 64
    shift = auto.crossover
    if "symmetric" in more:
        assert abs(shift / (d * d + d + 1) - 1) < 1.5 / d  # the paper's N0
    shorter, longer = round(0.8 * shift) // 64 * 64 or 32, -(-round(1.2 * shift) // 64) * 64
    assert counted(direct, shorter) < counted(factored, shorter)
    assert counted(direct, longer) > counted(factored, longer)


def test_auto_takes_the_cheaper_form():
    auto, direct, factored = layers("auto", "direct", "factored", more=", bidirectional=True", head_dim=8)
    assert auto.crossover == crossover(8, 8, 45, bidirectional=True) == 51
    assert counted(auto, 50) == counted(direct, 50) != counted(factored, 50)
    assert counted(auto, 51) == counted(factored, 51) != counted(direct, 51)


@pytest.mark.slow
@pytest.mark.parametrize("d", [8, 16, 32])
def test_the_crossover_by_the_clock(d: int):
    """Processor time: the direct form is the faster one at half of the computed length, the factored one at twice of it."""
    direct, factored = layers("direct", "factored", more=", bidirectional=True, symmetric=False", head_dim=d)
    shift = direct.crossover

    def seconds(n: int) -> list[float]:
        q, k, v = (torch.randn(1, 256 // d, n, d) for _ in range(3))
        call, best = direct.whole(torch.randn(1, n, 1)), [float("inf")] * 2
        for _ in range(9):
            for index, run in enumerate((lambda: direct._direct(q, k, v, None), lambda: factored._both_ways(q, k, v, call))):
                begin = time.process_time()
                run()
                best[index] = min(best[index], time.process_time() - begin)
        return best

    with torch.no_grad():
        short, long = seconds(shift // 2), seconds(2 * shift)
    assert short[0] < short[1] and long[0] > long[1], (short, long)


def test_wrong_fields_are_refused():
    for spec, message in (("taylorshift(b=2.0)", r"at least b\^2"), ("taylorshift(form='slow')", "is not 'auto'")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=2)
