"""fast-factorizable: moments against explicit weights, their signs, and how near they come to softmax."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear.polynomial import Polynomial


def explicit(layer, x: torch.Tensor, order: int) -> torch.Tensor:
    """a0 + a1 x + a2 x^2 of the normalised q.k / temperature, written out."""
    call = layer.whole(x)
    q, k, v, _ = layer.project(x, {}, call)
    q, k = layer.features(q, k, call)
    s = q @ k.mT * layer.scale
    w = 1 + s + (s**2 / 2 if order == 2 else 0)
    w = w if layer.bidirectional else w.tril()
    return layer.o_proj((w / w.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("more", ["", ", temperature=5.0", ", bidirectional=True", ", bidirectional=True, norm='largest'"])
def test_moments_equal_the_explicit_weights(order: int, more: str):
    torch.manual_seed(0)
    layer = saccade.mixer(f"fast-factorizable(order={order}{more})", dim=32, heads=4).double()
    layer.section = 32
    x = torch.randn(2, 100, 32, dtype=torch.float64)
    assert (layer(x)[0] - explicit(layer, x, order)).abs().max() < 1e-10


@pytest.mark.parametrize("more", ["", "bidirectional=True, norm='largest'"])
def test_normalised_products_are_at_most_one(more: str):
    layer = saccade.mixer(f"fast-factorizable({more})", dim=32, heads=4).double()
    x = 50 * torch.randn(2, 60, 32, dtype=torch.float64)
    call = layer.whole(x)
    q, k, _, _ = layer.project(x, {}, call)
    q, k = layer.features(q, k, call)
    assert q.mean(-1).abs().max() < 1e-12
    assert 0.3 < (q @ k.mT * layer.scale).abs().max() <= 1 + 1e-9


def test_order_two_is_positive_everywhere_and_order_one_is_not():
    s = torch.linspace(-50, 50, 10001, dtype=torch.float64)
    assert Polynomial((1.0, 1.0, 0.5)).score(s).min() >= 0.5
    one = Polynomial((1.0, 1.0, 0.0)).score(s)
    assert one[s < -1].max() < 0 and one[s.abs() <= 1].min() >= -1e-12


def test_order_two_is_nearer_to_softmax_than_order_one():
    s = 2 * torch.rand(200, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    errors = []
    for c2 in (0.0, 0.5):
        w = Polynomial((1.0, 1.0, c2)).score(s)
        errors.append(float((w / w.sum(-1, keepdim=True) - s.softmax(-1)).abs().mean()))
    assert errors[1] < errors[0] / 3


def test_the_backward_pass_keeps_no_features():
    """Bytes kept for it grow with N D and not with N D^2."""
    torch.manual_seed(2)
    layer = saccade.mixer("fast-factorizable", dim=64, heads=1)
    x = torch.randn(1, 2048, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, keep=False)
    features = 2048 * layer.polynomial.width(64) * 4
    assert sum(kept.values()) < features


def test_dropout_is_for_training_alone():
    torch.manual_seed(3)
    layer = saccade.mixer("fast-factorizable(dropout=0.2)", dim=32, heads=4)
    x = torch.randn(1, 20, 32)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_wrong_fields_are_refused():
    for spec, message in (
        ("fast-factorizable(order=3)", "give 1 or 2"), ("fast-factorizable(norm='largest')", "or bidirectional=True"),
        ("fast-factorizable(temperature=0.0)", "positive number"), ("fast-factorizable(dropout=1.0)", "probability"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
