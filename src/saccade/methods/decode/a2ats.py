"""A2ATS: far keys lose their position, so that one codebook, made offline for what queries see, tells which of them to read.

Scoring (windowed rotary embedding): keys nearer than w turn as usual and are always read; beyond, every distance counts as b: the query
is turned to position b, the key not at all. A key k, turned back, is stored as one code; a step makes one table a head:

    H = sum q_b^T q_b  (queries at position b, pooled over the heads of a group, divided by its root mean square),  H + eps I = L L^T
    E[score error of c for k] = (k - c) H (k - c)^T = |(k - c) L|^2      so k L is clustered, and C L^-1 are the keys that codes stand for
    code_t = argmin_j |k_t L - C_j|,     score_t = table[code_t],     table = q_b (C L^-1)^T * scale

The best tokens of the query heads that share a key head are read by all of them, with their true positions.

Source: a2ats, arXiv 2502.12665.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Calibrated, Decode, Info, LayerContext, Mass, Rotary, Selection, Threshold, register
from saccade.parts.clusters import kmeans, nearest
from saccade.parts.columns import cut, extend
from saccade.parts.dots import dots
from saccade.parts.heads import read_union
from saccade.parts.pick import pick_best
from saccade.parts.placed import placed
from saccade.parts.rotary import turn

ROWS = 4096  # keys encoded at a time: bounds their float32 copies


@register
@dataclass(frozen=True, kw_only=True)
class A2ATS(Decode, Calibrated):
    """budget: tokens that each query head chooses among those between sinks and window (int), or their share of all entries (float);
        the union over the heads of a group is read.
    window: newest tokens w, always read. sinks: first tokens, always read. distance: position b of the query when it is scored.
    centroids: size of a key head's codebook, at most 32767; fewer where there are fewer calibration keys.
    eps: added to H's diagonal, H's root mean square being 1. samples: calibration keys per head, the first ones. iterations: of
        k-means at most.

    Entries are taken to stand at the positions 0, 1, ...: that is so unless a cache policy drops some, which then blurs the scores.
    """

    budget: float | int = 0.03
    window: int = 64
    sinks: int = 8
    distance: int = 2048
    centroids: int = 4096
    eps: float = 1e-6
    samples: int = 65536
    iterations: int = 50

    info = Info(
        slug="a2ats", phase="decode", reads_encoded=True, needs=frozenset({"calibration"}), opened={"budget": 1.0},
        tiny={"budget": 0.1, "window": 8, "sinks": 2, "distance": 64, "centroids": 16},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        least = {"window": 1, "sinks": 0, "distance": 0, "centroids": 1, "samples": 1, "iterations": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"a2ats({name}={value!r}) is not a whole number of at least {low}")
        if self.centroids > 32767:
            raise ValueError(f"a2ats(centroids={self.centroids}) does not fit a 16-bit code: give at most 32767")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 < self.eps < math.inf:
            raise ValueError(f"a2ats(eps={self.eps!r}) is not a positive number")
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("a2ats chooses a fixed number of tokens: its budget is a ratio or a number of tokens")

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """"moment" `(Hk, D, D)` float64: sum of q_b^T q_b; "keys" `(Hk, n, D)`: keys without position, one row after another."""
        rotary = self._rotary(ctx)
        places = torch.arange(k.shape[2], device=k.device)
        far = ctx.layout.to_groups(turn(q, self.distance - places, rotary)).double().transpose(0, 1).flatten(1, 3)
        return {"moment": far.mT @ far, "keys": turn(k, -places, rotary).transpose(0, 1).flatten(1, 2)[:, : self.samples]}

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        if not sums:
            return found
        keys = torch.cat([sums["keys"], found["keys"]], dim=1)[:, : self.samples]
        return {"moment": sums["moment"] + found["moment"], "keys": keys}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """"factor" L `(Hk, D, D)`, "codebook" C and "lookup" C L^-1 `(Hk, c, D)`, float32."""
        moment = sums["moment"]
        size = moment.square().mean((-1, -2), keepdim=True).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        ridge = self.eps * torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
        factor = torch.linalg.cholesky(moment / size + ridge)
        generator = torch.Generator().manual_seed(0)
        points = (sums["keys"].double() @ factor).float()
        codebook = kmeans(points, self.centroids, generator=generator, iterations=self.iterations).centroids
        lookup = torch.linalg.solve_triangular(factor, codebook.double(), upper=False, left=False)
        return {"factor": factor.float(), "codebook": codebook, "lookup": lookup.float()}

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def _rotary(self, ctx: LayerContext) -> Rotary:
        if ctx.rotary is None:
            raise ValueError("a2ats takes the position out of keys: this model has no rotary embedding that can be turned back")
        return ctx.rotary

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        rotary, exact = self._rotary(ctx), torch.promote_types(k.dtype, torch.float32)
        factor, codebook = (placed(ctx.found(name), k.device, exact) for name in ("factor", "codebook"))
        codebook = codebook.expand(k.shape[0], -1, -1, -1).flatten(0, 1)
        codes = []
        for begin, piece in zip(range(start, start + k.shape[2], ROWS), k.split(ROWS, dim=2), strict=True):
            places = torch.arange(begin, begin + piece.shape[2], device=k.device)
            codes.append(nearest((turn(piece.to(exact), -places, rotary) @ factor).flatten(0, 1), codebook).to(torch.int16))
        extend(ctx.state, codes=torch.cat(codes, dim=1).unflatten(0, k.shape[:2]))

    def rewind(self, ctx: LayerContext, n: int) -> int:
        return cut(ctx.state, n, "codes")

    def estimate(self, ctx: LayerContext, q: Tensor) -> Tensor:
        """Approximate logits of q `(B, Hq, 1, D)`, as if every key were `distance` away: `(B, Hq, n)`."""
        exact = torch.promote_types(q.dtype, torch.float32)
        far = turn(q.to(exact), self.distance - (ctx.seen - 1), self._rotary(ctx)).squeeze(2)
        lookup = placed(ctx.found("lookup"), q.device, exact).expand(q.shape[0], -1, -1, -1)
        table = ctx.layout.to_groups(dots(far, lookup) * ctx.scale)
        codes = ctx.state["codes"].view.long().unsqueeze(2)
        return table.gather(-1, codes.expand(-1, -1, table.shape[2], -1)).flatten(1, 2)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n = k.shape[2]
        every = torch.arange(n, device=k.device)
        begin = min(self.sinks, n)
        end = max(begin, n - self.window)
        best = pick_best(self.estimate(ctx, q)[..., begin:end], min(Budget.of(self.budget).tokens(n), end - begin)) + begin
        forced = torch.cat([every[:begin], every[end:]]).expand(*best.shape[:2], -1)
        return read_union(torch.cat([best, forced], dim=-1), ctx.layout.kv_heads, n)
