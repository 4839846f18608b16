"""One managed layer on bare tensors, for tests that know every key."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from saccade.attach.layers import LayerCall, LayerRunner
from saccade.cache import KVLayer
from saccade.core import CachePolicy, Rotary


class Single:
    """A KVLayer and the runner that an attached model would give it."""

    def __init__(
        self, policy: CachePolicy | None, *, rotary: Rotary | None = None, when: str = "prompt", layer: int = 0
    ) -> None:
        self.runner = LayerRunner(
            layer=layer, layers=layer + 1, prefill=None, decode=None, policy=policy, plans={}, when=when, impl="auto",
            seed=0, rotary=rotary,
        )  # fmt: skip
        self.layer = KVLayer()
        self.layer.before_append = partial(self.runner.before_append, self.layer)
        self.layer.after_crop = partial(self.runner.after_crop, self.layer)

    def feed(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
        """Attention output `(B, Hq, m, Dv)` of m new tokens; real `(B, m)` bool marks those that are no padding."""
        self.layer.expect(real)
        keys, values = self.layer.update(k, v)
        call = LayerCall(q=q, k=keys, v=values, scale=q.shape[-1] ** -0.5, softcap=None, real=real, shared={})
        return self.runner.run(call, self.layer)

    def steps(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same, one token at a time."""
        parts = [self.feed(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1]) for i in range(q.shape[2])]
        return torch.cat(parts, dim=2)

    def end_prompt(self) -> None:
        self.runner.end_prompt(self.layer)

    def kept(self, row: int = 0) -> list[list[int]]:
        """Positions held by each head of a row, ascending."""
        positions = [self.layer.open(row if self.layer.padded else None)][0]
        batch = 0 if self.layer.padded else row
        valid = positions.valid
        return [
            head[:] if valid is None else head[: int(valid[batch, h].sum())]
            for h, head in enumerate(positions.side["positions"][batch].tolist())
        ]


def random_qkv(
    n: int, *, batch: int = 1, query_heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, sharp: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q `(B, Hq, n, D)`, k, v `(B, Hk, n, D)` in float64; `sharp` scales the logits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, query_heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q * sharp, k, v
