"""k-means: what it finds, what it does with empty clusters and weights, and that sets do not disturb each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.parts import clusters
from saccade.parts.clusters import cluster_means, kmeans, nearest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(sets: int = 3, count: int = 6, each: int = 40, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Points `(sets, count * each, dim)` around far centres, and which."""
    g = seeded(7)
    centres = 10 * torch.randn(sets, count, dim, generator=g)
    which = torch.arange(count).repeat_interleave(each)
    return centres[:, which] + 0.3 * torch.randn(sets, count * each, dim, generator=g), which


def spread(points: Tensor, labels: Tensor, centroids: Tensor) -> float:
    """Mean squared distance to the own centroid."""
    return float((points - centroids.gather(-2, labels.unsqueeze(-1).expand(points.shape))).square().sum(-1).mean())


def test_planted_clusters_are_found() -> None:
    points, which = blobs()
    found = kmeans(points, 6, generator=seeded())
    for labels in found.labels:
        assert all(len(set(labels[which == i].tolist())) == 1 for i in range(6)) and len(set(labels.tolist())) == 6
    assert bool((found.weights == 40).all())
    means = torch.stack([torch.stack([points[s, found.labels[s] == i].mean(0) for i in range(6)]) for s in range(3)])
    assert float((found.centroids - means).abs().max()) < 1e-4


def test_a_fixed_point_is_reached() -> None:
    points = torch.randn(2, 500, 8, generator=seeded(1))
    found = kmeans(points, 20, generator=seeded())
    assert torch.equal(nearest(points, found.centroids), found.labels)
    assert torch.equal(nearest(points, found.centroids), torch.cdist(points, found.centroids).argmin(-1))
    one_step = kmeans(points, 20, generator=seeded(), iterations=1)
    assert spread(points, found.labels, found.centroids) < 0.95 * spread(points, one_step.labels, one_step.centroids)


def test_far_seeds_are_worth_more_than_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = blobs(sets=1, count=30, each=20)
    ours = [spread(points, c.labels, c.centroids) for c in (kmeans(points, 30, generator=seeded(s)) for s in range(5))]

    def uniform(x: Tensor, count: int, g: torch.Generator, w: Tensor) -> Tensor:
        return x[:, torch.randperm(x.shape[1], generator=g)[:count]]

    monkeypatch.setattr(clusters, "spread_seeds", uniform)
    monkeypatch.setattr(clusters, "_filled", lambda x, labels, means, sums: means)
    plain = [spread(points, c.labels, c.centroids) for c in (kmeans(points, 30, generator=seeded(s)) for s in range(5))]
    assert sum(ours) < 0.5 * sum(plain)


def test_sets_do_not_depend_on_each_other_or_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(2, 3, 200, 8, generator=seeded(2), dtype=torch.float64)
    together = kmeans(points, 12, generator=seeded())
    assert together.centroids.shape == (2, 3, 12, 8) and together.labels.shape == (2, 3, 200)
    alone = kmeans(points[1, 2], 12, generator=seeded())
    assert torch.equal(alone.labels, together.labels[1, 2])
    monkeypatch.setattr(clusters, "CHUNK", 300)
    assert torch.equal(kmeans(points, 12, generator=seeded()).labels, together.labels)


def test_the_seed_decides() -> None:
    points = torch.randn(1, 300, 8, generator=seeded(3))
    a, b, c = (kmeans(points, 10, generator=seeded(s)).centroids for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_weights_count_as_repeated_points() -> None:
    points = torch.randn(1, 60, 4, generator=seeded(4), dtype=torch.float64)
    times = torch.randint(0, 4, (60,), generator=seeded(5))
    found = kmeans(points, 8, generator=seeded(), weights=times)
    labels = found.labels[0].repeat_interleave(times)
    means, sums = cluster_means(points[:, torch.arange(60).repeat_interleave(times)], labels[None], 8)
    assert float((means - found.centroids).abs().max()) < 1e-12 and torch.equal(sums, found.weights)
    assert int(found.weights.sum()) == int(times.sum())


def test_empty_clusters_move_to_the_farthest_points() -> None:
    points = torch.tensor([[0.0], [0.1], [5.0], [9.0], [9.1], [20.0]])[None]
    labels = torch.tensor([[0, 0, 0, 2, 2, 2]])
    means, sums = cluster_means(points, labels, 4)
    assert sums.tolist() == [[3, 0, 3, 0]]
    filled = clusters._filled(points, labels, means, sums)
    # 20 is 7.3 from its mean 12.7, then 3.7 (9), 3.6 (9.1) and 3.3 (5 from 1.7)
    assert filled.flatten().tolist() == pytest.approx([1.7, 20.0, 12.7, 9.0])


def test_coinciding_points_leave_empty_clusters_without_weight() -> None:
    points = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(1, 4, 1)
    found = kmeans(points, 3, generator=seeded())
    assert sorted(found.weights.flatten().tolist()) == [0, 2, 2]
    assert bool(found.centroids.isfinite().all()) and spread(points, found.labels, found.centroids) == 0
    assert kmeans(points, 9, generator=seeded()).centroids.shape == (1, 4, 1)


def test_as_many_clusters_as_points_is_one_each() -> None:
    points = torch.randn(1, 50, 8, generator=seeded(6))
    found = kmeans(points, 50, generator=seeded())
    assert sorted(found.labels[0].tolist()) == list(range(50)) and bool((found.weights == 1).all())
    assert spread(points, found.labels, found.centroids) == 0


def test_refuses() -> None:
    for points, count in ((torch.zeros(2, 0, 4), 3), (torch.zeros(2, 5, 4), 0)):
        with pytest.raises(ValueError, match="give at least one point and one cluster"):
            kmeans(points, count, generator=seeded())


def test_clusters_that_begin_empty_get_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(1, 100, 4, generator=seeded(8)) + 5
    monkeypatch.setattr(clusters, "spread_seeds", lambda x, count, g, w: x[:, :1].expand(-1, count, -1))
    assert bool((kmeans(points, 5, generator=seeded()).weights > 0).all())
    monkeypatch.setattr(clusters, "_filled", lambda x, labels, means, sums: means)
    assert bool((kmeans(points, 5, generator=seeded()).weights == 0).any())
