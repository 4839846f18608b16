"""Tiny attention-only models that learn a task in seconds, to see what a pattern lets through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import saccade

Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]  # inputs (B, N) ids and targets (B, N), -100 where nothing is asked


class Learner(nn.Module):
    """Embeddings, layers of attention by `method` with residuals, logits. Positions are learnt."""

    def __init__(self, method: str, *, ids: int, out: int, n: int, layers: int = 1, heads: int = 4, dim: int = 32) -> None:
        super().__init__()
        self.method, self.heads = method, heads
        self.embed, self.place = nn.Embedding(ids, dim), nn.Embedding(n, dim)
        self.mix = nn.ModuleList(nn.Linear(dim, 3 * dim, bias=False) for _ in range(layers))
        self.project = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.read = nn.Linear(dim, out)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for i, (mix, project, norm) in enumerate(zip(self.mix, self.project, self.norms, strict=True)):
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in mix(norm(x)).chunk(3, -1))
            mixed = saccade.attention(q, k, v, method=self.method, layer=i, layers=len(self.mix), impl="reference")
            x = x + project(mixed.transpose(1, 2).flatten(2))
        return self.read(x)


def accuracy(method: str, batch: Batch, *, steps: int, ids: int, out: int, n: int, rate: float = 1e-2, **shape: int) -> Tensor:
    """Trains on fresh batches; the share of right answers at each position of later ones, `(N,)`, nan where nothing was asked."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Learner(method, ids=ids, out=out, n=n, **shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        inputs, targets = batch(generator)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rounds = [batch(generator) for _ in range(8)]
        inputs, targets = (torch.cat(x) for x in zip(*rounds, strict=True))
        right, asked = model(inputs).argmax(-1) == targets, targets >= 0
    return (right & asked).double().sum(0) / asked.double().sum(0)
