"""hedgehog: learned maps come nearer to softmax than fixed ones, and order keys as it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade.parts.linear.features import FeatureMap, feature_map
from saccade.parts.linear.mimicry import linear_weights, mimicry_loss, softmax_weights


class Linear(FeatureMap):
    """T2R's map: relu(W x + b)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(heads, dim, dim) / dim**0.5), nn.Parameter(0.5 * torch.ones(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.mT + self.bias).relu() + 1e-6


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of two heads whose products are spread as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    return 1.6 * torch.randn(1, 2, 64, 16, generator=generator), 1.6 * torch.randn(1, 2, 64, 16, generator=generator)


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


def spearman(a: Tensor, b: Tensor) -> float:
    """The mean over rows of the correlation of ranks."""
    return float(torch.stack([torch.corrcoef(torch.stack([x, y]))[0, 1] for x, y in zip(ranks(a), ranks(b), strict=True)]).mean())


def test_after_500_steps_the_maps_are_nearer_to_softmax_than_others():
    torch.manual_seed(0)
    maps: dict[str, list[FeatureMap]] = {
        "hedgehog": [feature_map("hedgehog", 2, 16) for _ in range(2)], "t2r": [Linear(2, 16) for _ in range(2)],
        "elu+1": [feature_map("elu+1")] * 2, "relu": [feature_map("relu")] * 2,
    }  # fmt: skip
    for name in ("hedgehog", "t2r"):
        optimizer = torch.optim.AdamW([p for one in maps[name] for p in one.parameters()], lr=1e-2)
        for step in range(500):
            q, k = inputs(step % 50)
            loss = mimicry_loss(softmax_weights(q, k), linear_weights(maps[name][0](q), maps[name][1](k)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    q, k = inputs(1000)
    teacher = softmax_weights(q, k)
    entropy = mimicry_loss(teacher, teacher)
    students = {name: linear_weights(a(q), b(k) + (1e-6 if name == "relu" else 0)).detach() for name, (a, b) in maps.items()}
    distance = {name: float(mimicry_loss(teacher, student) - entropy) for name, student in students.items()}
    assert all(distance["hedgehog"] < 0.95 * distance[name] for name in ("t2r", "elu+1", "relu")), distance
    order = {name: spearman((q @ k.mT)[0, 0, 20:, :20], students[name][0, 0, 20:, :20]) for name in ("hedgehog", "elu+1")}
    assert order["hedgehog"] > order["elu+1"] and order["hedgehog"] > 0.6, order


def test_the_layer_teaches_its_maps_alone():
    torch.manual_seed(1)
    layer = saccade.mixer("hedgehog", dim=64, heads=4, kv_heads=2)
    x = 3 * torch.randn(2, 48, 64)
    layer.mimicry(x).backward()
    taught = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert taught == {"q_map.weight", "q_map.bias", "k_map.weight", "k_map.bias"}
    optimizer, losses = torch.optim.AdamW([*layer.q_map.parameters(), *layer.k_map.parameters()], lr=1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = layer.mimicry(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_the_layer_s_loss_is_the_cross_entropy_with_its_softmax_after_the_rotary_embedding():
    torch.manual_seed(4)
    layer = saccade.mixer("hedgehog", dim=64, heads=4).double()
    x = 2 * torch.randn(1, 20, 64, dtype=torch.float64)
    call = layer.whole(x)
    q, k, _, _ = layer.project(x, {}, call)
    student = linear_weights(*layer.features(q, k, call))
    logits = layer.rotary(q, call.positions) @ layer.rotary(k, call.positions).mT / 4
    rows = [-(logits[:, :, t, : t + 1].softmax(-1) * student[:, :, t, : t + 1].log()).sum(-1) for t in range(20)]
    assert abs(float((layer.mimicry(x) - torch.stack(rows).mean()).detach())) < 1e-12


def test_maps_start_at_the_identity_with_both_signs():
    x = torch.randn(3, 4, 5, 16, dtype=torch.float64)
    each = saccade.mixer("hedgehog", dim=64, heads=4).double().q_map(x)
    assert torch.allclose(each, torch.cat([x.softmax(-1), (-x).softmax(-1)], -1))
    joint = saccade.mixer("hedgehog(activation='joint')", dim=64, heads=4).double().q_map(x)
    assert torch.allclose(joint, torch.cat([2 * x, -2 * x], -1).softmax(-1)) and torch.allclose(joint.sum(-1), torch.ones(3, 4, 5).double())
    plain = saccade.mixer("hedgehog(activation='exp')", dim=64, heads=4).double().q_map(x)
    assert torch.allclose(plain, torch.cat([x.exp(), (-x).exp()], -1))
    assert torch.isfinite(saccade.mixer("hedgehog", dim=64, heads=4).q_map(1e4 * x.float())).all()


def test_the_output_is_the_taught_weights_times_the_values():
    torch.manual_seed(2)
    for more, causal in (("", True), ("bidirectional=True", False)):
        layer = saccade.mixer(f"hedgehog({more})", dim=64, heads=4).double()
        x = torch.randn(2, 70, 64, dtype=torch.float64)
        call = layer.whole(x)
        q, k, v, _ = layer.project(x, {}, call)
        out = linear_weights(*layer.features(q, k, call), causal=causal) @ v
        assert (layer(x)[0] - layer.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-12


def test_a_wrong_activation_is_refused():
    with pytest.raises(ValueError, match="is not 'softmax', 'joint' or 'exp'"):
        saccade.mixer("hedgehog(activation='relu')", dim=64, heads=4)
