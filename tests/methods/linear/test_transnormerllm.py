"""transnormerllm: relative positions by doubling, decays by depth, and the recurrence that does not overflow."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops.scan import scan
from saccade.parts.linear.lrpe import Lrpe


def test_products_depend_on_the_distance_by_the_cosine():
    torch.manual_seed(0)
    part = Lrpe(3, 10).double()
    part.theta.data = torch.rand(3, 10, dtype=torch.float64)
    q, k = torch.randn(2, 1, 3, 40, 10, dtype=torch.float64).unbind(0)
    positions = torch.arange(40)[None] + 1000
    found = part(q, positions) @ part(k, positions).mT
    distance = (torch.arange(40)[:, None] - torch.arange(40)).double()
    expected = torch.einsum("bhic,bhjc,hijc->bhij", q, k, (distance[..., None] * part.theta[:, None, None]).cos())
    assert part(q, positions).shape[-1] == 20
    assert (found - expected).abs().max() < 1e-10


def test_the_layer_is_the_paper_s_sum():
    torch.manual_seed(1)
    layer = saccade.mixer("transnormerllm(slopes='linear')", dim=32, heads=4, layer=0, layers=6).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    distance = (torch.arange(50)[:, None] - torch.arange(50)).double()
    angles = (distance[..., None] * layer.rotary.theta[:, None, None]).cos()
    slopes = 8 * torch.arange(1, 5).double() / 4
    weights = torch.einsum("bhic,bhjc,hijc->bhij", q, k, angles) * (-slopes[:, None, None] * distance.clamp(min=0)).exp()
    out = (weights.tril() @ v).transpose(1, 2).flatten(2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_gate.project(x)
    assert (layer(x)[0] - layer.o_proj(out)).abs().max() < 1e-10


def test_only_the_first_layer_has_positions_by_default():
    layers = [saccade.mixer("transnormerllm", dim=32, heads=4, layer=i, layers=3) for i in range(3)]
    rows = [layer(torch.randn(1, 3, 32))[1].values["s"].shape[2] for layer in layers]
    assert rows == [16, 8, 8]  # LRPE doubles the rows of the state
    every, none = (saccade.mixer(f"transnormerllm(lrpe='{lrpe}')", dim=32, heads=4, layer=1, layers=3) for lrpe in ("all", "none"))
    assert every.rotary is not None and none.rotary is None
    lightning = saccade.mixer("lightning-attention", dim=32, heads=4, layer=1, layers=3)
    lightning.load_state_dict(none.state_dict())
    x = torch.randn(1, 20, 32)
    assert torch.equal(none(x)[0], lightning(x)[0])  # the same layer apart from them


def test_the_last_layer_keeps_all():
    for slopes in ("alibi", "linear"):
        spec = f"transnormerllm(slopes='{slopes}')"
        layers = [saccade.mixer(spec, dim=32, heads=4, layer=i, layers=24) for i in (0, 12, 23)]
        decays = [layer.gate.slopes.neg().exp() for layer in layers]
        assert (decays[0] < decays[1]).all() and (decays[1] < decays[2]).all()
        assert decays[2].min() > (0.999 if slopes == "alibi" else 0.7)


def test_the_naive_recurrence_overflows_where_the_robust_one_does_not():
    """[kv]_t scaled by lambda^-t, as the model was first written, against KV_t = lambda KV_{t-1} + k v^T: equal for short t."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 1, 2000, 8) for _ in range(3))
    slope = torch.tensor([0.25])
    grown = torch.exp(slope * torch.arange(1.0, 2001.0))[:, None]
    state = torch.einsum("td,te->tde", (k * grown)[0, 0], v[0, 0]).cumsum(0)
    naive = torch.einsum("td,tde->te", q[0, 0], state) / grown
    robust = scan(q, k, v, log_decay=-slope, scale=1.0)[0][0, 0]
    assert (naive - robust)[:60].abs().max() < 1e-4
    assert not torch.isfinite(naive[-1]).all() and torch.isfinite(robust).all()


def test_wrong_fields_are_refused():
    for spec, message in (("transnormerllm(lrpe='last')", "is not 'first'"), ("transnormerllm(slopes='x')", "are not known")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
