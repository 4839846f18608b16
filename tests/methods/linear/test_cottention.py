"""cottention: the masked form is the recurrence, and the power of the length lies between a mean and a sum."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import saccade


def made(more: str = "", n: int = 80):
    torch.manual_seed(0)
    layer = saccade.mixer(f"cottention({more})", dim=32, heads=4).double()
    x = torch.randn(2, n, 32, dtype=torch.float64)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    return layer, x, normalize(q, dim=-1), normalize(k, dim=-1), v


def joined(layer, out: torch.Tensor) -> torch.Tensor:
    return layer.o_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("on", ["values", "output"])
def test_the_masked_form_is_the_recurrence(on: str):
    layer, x, q, k, v = made(f"on='{on}'")
    layer.normaliser.m.data = torch.tensor([-2.0, 0.0, 0.5, 2.0]).double()
    c = layer.normaliser.m.sigmoid()[:, None, None]
    power = torch.arange(1.0, 81.0).double()[:, None] ** c
    masked = (q @ k.mT).tril() @ (v / power) if on == "values" else (q @ k.mT).tril() @ v / power
    state, outs = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(80):
        value = v[:, :, t] / power[:, t] if on == "values" else v[:, :, t]
        state = state + k[:, :, t, :, None] * value[:, :, None]
        out = (q[:, :, t, None] @ state).squeeze(2)
        outs.append(out if on == "values" else out / power[:, t])
    assert (torch.stack(outs, 2) - masked).abs().max() < 1e-12
    y, end = layer(x)
    assert (y - joined(layer, masked)).abs().max() < 1e-6  # a length of 0 is kept from dividing by 0
    assert (end.values["s"] - state).abs().max() < 1e-6


def test_both_ways_the_length_is_that_of_the_whole_row():
    layer, x, q, k, v = made("bidirectional=True")
    c = layer.normaliser.m.sigmoid()[:, None, None]
    assert (layer(x)[0] - joined(layer, q @ (k.mT @ v) / 80**c)).abs().max() < 1e-6
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[0, 50:] = False
    assert (layer(x, valid=valid)[0][0, :50] - layer(x[:1, :50])[0][0]).abs().max() < 1e-12


def test_outputs_are_bounded_by_a_power_of_the_length():
    layer, x, q, k, v = made("on='output'")
    c = layer.normaliser.m.sigmoid()
    assert torch.allclose(c, torch.tensor(0.5).double().sigmoid())
    out = (q @ k.mT).tril() @ v / torch.arange(1.0, 81.0).double()[:, None] ** c[0]
    bound = torch.arange(1.0, 81.0).double() ** (1 - c[0]) * v.norm(dim=-1).amax(-1, keepdim=True)
    assert (out.norm(dim=-1) <= bound).all()
    # equal tokens reach it
    same = x[:, :1].expand(-1, 80, -1)
    q, k, v, _ = layer.project(same, {}, layer.whole(same))
    k = q = normalize(q, dim=-1)
    out = (q @ k.mT).tril() @ v / torch.arange(1.0, 81.0).double()[:, None] ** c[0]
    assert torch.allclose(out.norm(dim=-1), v.norm(dim=-1) * torch.arange(1.0, 81.0).double() ** (1 - c[0]))


def test_large_powers_make_means_and_small_ones_sums():
    layer, x, q, k, v = made("on='output'")
    total = (q @ k.mT).tril() @ v
    layer.normaliser.m.data.fill_(40.0)
    assert (layer(x)[0] - joined(layer, total / torch.arange(1.0, 81.0).double()[:, None])).abs().max() < 1e-6
    layer.normaliser.m.data.fill_(-40.0)
    assert (layer(x)[0] - joined(layer, total)).abs().max() < 1e-6


def test_later_calls_count_from_the_start_of_the_sequence():
    layer, x, *_ = made()
    y, state = layer(x[:, :50])
    assert (torch.cat([y, layer(x[:, 50:], state)[0]], 1) - layer(x)[0]).abs().max() < 1e-12
    assert (layer(x[:, 50:])[0] - layer(x)[0][:, 50:]).abs().max() > 1e-6


def test_a_wrong_field_is_refused():
    with pytest.raises(ValueError, match="is not 'values' or 'output'"):
        saccade.mixer("cottention(on='keys')", dim=32, heads=4)
