"""log-linear-attention: the levels of the tree, the merging states, and the hosts as limits."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear import Recurrent
from saccade.parts.linear.fenwick import fenwick, level

HOSTS = ["mamba-2", "gated-deltanet"]


def made(spec: str, **sizes: int):
    torch.manual_seed(0)
    return saccade.mixer(spec, dim=32, heads=4, **sizes).double()


def walked(t: int, s: int) -> int:
    """The level of s by walking the set bits of t from the highest one, as the paper defines it."""
    if s == t:
        return 0
    begin = 0
    for bit in reversed(range(t.bit_length())):
        if t >> bit & 1:
            if begin <= s < begin + 2**bit:
                return bit + 1
            begin += 2**bit
    raise AssertionError


def test_levels_are_those_of_the_tree():
    order = torch.arange(70)
    found = level(order[:, None], order, 20)
    for t in range(70):
        assert [walked(t, s) for s in range(t + 1)] == found[t, : t + 1].tolist()
    assert level(order[:, None], order, 4).max() == 3


@pytest.mark.parametrize("delta", [False, True])
def test_merging_states_is_the_masked_matrix(delta: bool):
    """The recurrence as the paper writes it, state by state with counts, for 37 tokens."""
    n, levels, d = 37, 7, 6
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -torch.rand(1, 1, n, generator=generator, dtype=torch.float64)
    beta = torch.rand(1, 1, n, generator=generator, dtype=torch.float64) if delta else None
    lam = torch.rand(1, 1, n, levels, generator=generator, dtype=torch.float64)
    states, counts, outs = torch.zeros(levels + 1, d, d, dtype=torch.float64), [0] * (levels + 1), []
    for t in range(n):
        if counts[0]:  # the last token leaves level 0; full buckets carry over
            moved, size, at = states[0].clone(), counts[0], 1
            while counts[at]:
                moved, size = moved + states[at], size + counts[at]
                states[at], counts[at] = 0, 0
                at += 1
            states[at], counts[at], counts[0] = moved, size, 0
            assert size == 2 ** (at - 1)
        key, write = k[0, 0, t], torch.tensor(1.0).double() if beta is None else beta[0, 0, t]
        turn = torch.eye(d, dtype=torch.float64) - (write * torch.outer(key, key) if delta else 0)
        states = g[0, 0, t].exp() * (turn @ states)
        states[0], counts[0] = write * torch.outer(key, v[0, 0, t]), 1
        assert sum(count > 0 for count in counts) == t.bit_count() + 1
        outs.append(sum(lam[0, 0, t, at] * (q[0, 0, t] @ states[at]) for at in range(levels)))
    call = made("log-linear-attention").whole(torch.zeros(1, n, 32))
    for section in (64, 8, 5):
        out, kept = fenwick(q, k, v, lam, None, call, section=section, log_decay=g, beta=beta, scale=1.0)
        assert (out[0, 0] - torch.stack(outs)).abs().max() < 1e-13
        assert (kept[0, :, 0] - states[:levels]).abs().max() < 1e-13


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("levels", [1, 8])
def test_with_weights_of_one_it_is_its_host(host: str, levels: int):
    layer = made(f"log-linear-attention(host='{host}', levels={levels})")
    layer.level_weights = lambda x: torch.ones(x.shape[0], 4, x.shape[1], levels, dtype=x.dtype)
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    assert (layer(x)[0] - Recurrent.mix(layer, x, {}, layer.whole(x))[0]).abs().max() < 1e-12


def test_with_one_level_only_the_host_s_output_is_scaled():
    """The norm of the output then takes the weight away again: one level is the base."""
    for host in HOSTS:
        layer = made(f"log-linear-attention(host='{host}', levels=1)")
        layer.normaliser.eps = 0.0
        x = torch.randn(2, 100, 32, dtype=torch.float64)
        assert (layer(x)[0] - Recurrent.mix(layer, x, {}, layer.whole(x))[0]).abs().max() < 1e-10


def test_the_delta_host_is_gated_deltanet():
    layer = made("log-linear-attention(host='gated-deltanet', levels=1)")
    other = made("kimi-linear(gate='token')")
    other.load_state_dict({name: value for name, value in layer.state_dict().items() if name in other.state_dict()}, strict=False)
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    call = layer.whole(x)
    layer.out_gate = other.out_gate = None  # sigmoid of low rank there, silu here
    other.gate.project = layer.gate.project
    assert (Recurrent.mix(layer, x, {}, call)[0] - other(x)[0]).abs().max() < 1e-12


def test_states_follow_the_bits_of_the_length():
    layer = made("log-linear-attention", max_length=256)
    sizes = []
    for n in (1, 7, 64, 65, 100):
        states = layer(torch.randn(1, n, 32, dtype=torch.float64))[1].values["s"]
        full = [at for at in range(states.shape[1]) if states[0, at].abs().max() > 0]
        assert full == [0, *(bit + 1 for bit in range(8) if (n - 1) >> bit & 1)]
        sizes.append(states.shape[1])
    assert set(sizes) == {9}
    layers, x = [made("log-linear-attention", max_length=2**power) for power in (6, 8, 12)], torch.randn(1, 9, 32).double()
    held = [layer(x)[1].values["s"].nbytes for layer in layers]
    assert held[1] / held[0] == 9 / 7 and held[2] / held[0] == 13 / 7  # log2(T) + 1


def test_longer_sequences_than_foreseen_stay_in_the_last_level():
    layer = made("log-linear-attention(levels=4)")
    x = torch.randn(1, 200, 32, dtype=torch.float64)
    y, state = layer(x[:, :130])
    later = layer(x[:, 130:], state)[0]
    assert (torch.cat([y, later], 1) - layer.naive(x)).abs().max() < 1e-12


@pytest.mark.slow
def test_time_grows_hardly_faster_than_the_length():
    import time

    layer, times = made("log-linear-attention").float(), []
    with torch.no_grad():
        for n in (2048, 8192):
            x, best = torch.randn(1, n, 32), float("inf")
            for _ in range(3):
                begin = time.process_time()
                layer(x, keep=False)
                best = min(best, time.process_time() - begin)
            times.append(best)
    assert times[1] / times[0] < 7, times


def test_wrong_fields_are_refused():
    for spec, message in (("log-linear-attention(host='gla')", "is not 'mamba-2'"), ("log-linear-attention(levels=0)", "at least 1 level")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
