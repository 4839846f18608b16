"""parallax: softmax without a probe, covariance and streaming forms, rows that sum to 1, local linear attention as its limit."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear.moments import covariance, moments


def layer(spec: str, seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def inputs(n: int = 300, heads: int = 4, kv_heads: int = 2):
    draw = torch.Generator().manual_seed(1)
    q, r = (torch.randn(2, heads, n, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, n, d, dtype=torch.float64, generator=draw) for d in (8, 5))
    places = torch.arange(n)[None]
    return q, k, v, r, places.expand(2, -1), places


@torch.no_grad()
def test_no_probe_is_softmax_attention():
    x = torch.randn(2, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for fields in ("", "window=9", "qk_norm=True, rotary=False"):
        exact = layer(f"softmax({fields})", kv_heads=2)
        start = layer(f"parallax({fields})", kv_heads=2)
        start.load_state_dict(exact.state_dict(), strict=False)
        assert (start(x)[0] - exact(x)[0]).abs().max() < 1e-13
        start.r_proj.weight.data.normal_()
        assert (start(x)[0] - exact(x)[0]).abs().max() > 1e-2


def test_the_streamed_sums_are_the_covariance():
    """Over tiles of 128 queries and 256 keys with one running maximum, against all weights written out, with gradients."""
    q, k, v, r, own, places = inputs()
    for window in (None, 40):
        given = [x.clone().requires_grad_() for x in (q, k, v, r)]
        wide_k, wide_v = (x.repeat_interleave(2, 1) for x in given[1:3])
        mask = torch.ones(300, 300, dtype=torch.bool).tril()
        mask = mask if window is None else mask.triu(1 - window)
        p = (given[0] @ wide_k.mT * 0.7).masked_fill(~mask, float("-inf")).softmax(-1)
        mean = p @ wide_v
        cov = torch.einsum("bhij,bhjd,bhjc->bhidc", p, wide_k, wide_v) - (p @ wide_k).unsqueeze(-1) * mean.unsqueeze(-2)
        expected = mean, (given[3].unsqueeze(-2) @ cov).squeeze(-2)
        found = covariance(*given, own, places, scale=0.7, window=window)
        weights = [torch.randn(2, 4, 300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (3, 4)]
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() < 1e-12
        grads = [torch.autograd.grad(sum((a * w).sum() for a, w in zip(outs, weights, strict=True)), given) for outs in (found, expected)]
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() < 1e-11


def test_large_logits_neither_overflow_nor_vanish():
    q, k, v, r, own, places = inputs(60)
    q, k = 40 * q, 40 * k
    mean, slope, product = moments(q, k, v, r, own, places)
    best = (q @ k.repeat_interleave(2, 1).mT).masked_fill(torch.ones(60, 60).triu(1).bool(), float("-inf")).argmax(-1)
    picked = v.repeat_interleave(2, 1).gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 5))
    assert torch.isfinite(product).all() and float((mean - picked).norm(dim=-1).median()) < 1e-12
    assert slope.abs().max() <= (r @ k.repeat_interleave(2, 1).mT).abs().max()


@torch.no_grad()
def test_rows_sum_to_1_and_weights_may_be_negative():
    x = torch.randn(2, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    made = layer("parallax(zero=False)")
    call = made.whole(x)
    q, (k, _) = made.queries(x, call), made.keys(x, call)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    weights = made.weights(q, k, 3 * made.probe(x, call), mask)
    assert (weights.sum(-1) - 1).abs().max() < 1e-13 and weights.min() < -0.01


@torch.no_grad()
def test_constant_values_come_out_unchanged():
    q, k, v, r, own, places = inputs(200)
    mean, moved = covariance(q, k, v[:, :, :1].expand(-1, -1, 200, -1), r, own, places)
    assert (mean - moved - v[:, :, :1].repeat_interleave(2, 1)).abs().max() < 1e-12


@torch.no_grad()
def test_the_probe_is_turned_with_the_keys():
    """Only distances count: positions moved by a constant change nothing; and the probe's products are not scaled."""
    x = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    made = layer("parallax(zero=False)")
    assert (made(x, positions=torch.arange(50, 70)[None])[0] - made(x)[0]).abs().max() < 1e-11
    flat = layer("parallax(zero=False, scale=0.0, rotary=False)")
    k, v, r = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (flat.k_proj, flat.v_proj, flat.r_proj))
    last = v.mean(2) - ((r[:, :, -1:] @ k.mT).mT * (v - v.mean(2, keepdim=True))).mean(2)
    assert (flat(x)[0][:, -1] - flat.o_proj(last.flatten(1))).abs().max() < 1e-12


def test_the_state_is_that_of_softmax():
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    sizes = [layer(spec)(x)[1].nbytes for spec in ("softmax", "parallax", "softmax(window=8)", "parallax(window=8)")]
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3]


def test_wrong_fields_are_refused():
    for spec, message in (("parallax(scale=-1.0)", "at least 0"), ("parallax(window=0)", "at least 1 token")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
