"""latte: latents as a scan, as a distribution, and as efficient attention."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops.scan import scan


def made(spec: str, n: int = 60, size: float = 2.0):
    torch.manual_seed(0)
    layer = saccade.mixer(spec, dim=32, heads=4).double()
    x = size * torch.randn(2, n, 32, dtype=torch.float64)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    return layer, x, q, k, v


def explicit(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """p(s | t) as the sum over latents of the product of both factors, row by row."""
    rows = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for t in range(q.shape[2]):
        given = (k[:, :, : t + 1] - k[:, :, : t + 1].amax(2, keepdim=True)).exp()
        given = given / given.sum(2, keepdim=True)
        rows[:, :, t, : t + 1] = (q[:, :, t].softmax(-1).unsqueeze(2) * given).sum(-1)
    return rows


@pytest.mark.parametrize("more", ["", ", scaled=True"])
def test_the_scan_is_the_explicit_sum_over_latents(more: str):
    layer, x, q, k, v = made(f"latte(latents=24{more})")
    assert q.shape[-1] == k.shape[-1] == 6 and v.shape[-1] == 8  # 24 latents over 4 heads; values keep the heads' width
    scale = 8**-0.5 if more else 1.0
    p = explicit(scale * q, scale * k)
    assert p.min() >= 0 and torch.allclose(p.sum(-1), torch.ones(2, 4, 60).double())
    expected = layer.o_proj((p @ v).transpose(1, 2).flatten(2))
    assert (layer(x)[0] - expected).abs().max() < 1e-12
    z = (scale * k).logcumsumexp(2)
    gate = torch.nn.functional.pad(z[:, :, :-1] - z[:, :, 1:], (0, 0, 1, 0))
    out = scan((scale * q).softmax(-1), (scale * k - z).exp(), v, log_decay=gate, scale=1.0, impl="reference")[0]
    assert (layer.o_proj(out.transpose(1, 2).flatten(2)) - expected).abs().max() < 1e-12


def test_both_ways_it_is_efficient_attention():
    latte, x, *_ = made("latte(latents=32, bidirectional=True)")
    efficient = saccade.mixer("efficient-attention(bidirectional=True)", dim=32, heads=4).double()
    efficient.load_state_dict(latte.state_dict())
    assert torch.equal(efficient(x)[0], latte(x)[0])


def test_large_logits_do_not_overflow():
    """Keys of several hundred: exp of any of them alone is infinite."""
    torch.manual_seed(1)
    layer = saccade.mixer("latte(latents=24)", dim=32, heads=4)
    x = torch.randn(1, 100, 32)
    layer.k_proj.weight.data *= 1000
    assert layer.k_proj(x).max() > 500
    y, state = layer(x)
    assert torch.isfinite(y).all() and all(torch.isfinite(value).all() for value in state.values.values())
    exact = layer.double()(x.double())[0]
    assert (y - exact).abs().max() < 1e-4


def test_the_state_is_one_vector_for_each_latent():
    layer, x, *_ = made("latte(latents=24)")
    state = layer(x)[1]
    assert state.values["s"].shape == (2, 4, 6, 8) and state.values["gate"].shape == (2, 4, 6)


def test_dropout_is_for_training_alone():
    torch.manual_seed(3)
    layer = saccade.mixer("latte(latents=24, dropout=0.3)", dim=32, heads=4)
    x = torch.randn(1, 20, 32)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


def test_wrong_fields_are_refused():
    for spec, message in (("latte(latents=30)", "multiple of heads"), ("latte(latents=0)", "at least 1 latent")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
