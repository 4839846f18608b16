"""HyLRA: measure once which layers bear sparse attention and whose choice they can share, then solve for the cheapest safe policy.

Offline, on dense attention:

    error_l    |o' - o| / |o| of layer l's output o when only its best blocks are read, and
               KL(p' || p) = -log(attention on these blocks), p' being p cut to them: above a limit the layer must be FULL
    M_ij       share of layer j's best blocks that are among layer i's
    policy     FULL(j), or REUSE(i) where M_ij >= theta: fewest FULL layers first, then the largest sum of M, by dynamic program

At run time FULL layers attend to everything and publish their best blocks (by attention, the mean over heads) with the most recent ones;
REUSE layers read those and score nothing. The whole cache stays.

Source: hylra, arXiv 2602.00777, section 3. The limits, theta, blocks of 128, the recent blocks and the mean over heads are inferred. KL is
taken between attention distributions, on which it is well defined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Calibrated, Info, LayerContext, Mass, Prefill, Selection, Threshold, register
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import TileGrid, choose_tiles, pooled_probabilities
from saccade.parts.dots import weighted_values
from saccade.parts.page_mass import best_pages, page_sums
from saccade.parts.pick import read_pages
from saccade.parts.planner import Planner, found_role, planned_roles
from saccade.parts.probe import row_probabilities
from saccade.parts.reuse_plan import cheapest_reuse

PROBES = 32  # queries of a sample that are measured, spread over its second half


@register
@dataclass(frozen=True, kw_only=True)
class HyLRA(Planner, Prefill, Calibrated):
    """`attach(model, prefill="hylra", decode="hylra", plan=plan)`, or one of the two.

    budget: tokens that REUSE layers read per query (int), or their share of the cache (float): whole blocks.
    block: tokens per block. recent: last blocks that are always read, out of the budget.
    theta: the least similarity with which a layer may follow another one.
    max_error, max_divergence: a layer whose relative output error, or whose KL divergence in nats, is above it must be FULL.
    """

    budget: float | int = 2048
    block: int = 128
    recent: int = 1
    theta: float = 0.85
    max_error: float = 0.5
    max_divergence: float = 0.5

    info = Info(
        slug="hylra", phase="decode", reads_encoded=True, needs=frozenset({"calibration"}), opened={"theta": 2.0},
        tiny={"budget": 0.25, "block": 4, "theta": 0.0, "max_error": 1e9, "max_divergence": 1e9},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("block", "recent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"hylra got {name}={value!r}: expected a whole number of at least 1")
        for name in ("theta", "max_error", "max_divergence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"hylra got {name}={value!r}: expected a number of at least 0")
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("hylra reads a fixed number of blocks: its budget is a ratio or a number of tokens")

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        batch, n = q.shape[0], k.shape[2]
        rows = n - 1 - torch.arange(min(PROBES, n // 2)) * (n // 2) // min(PROBES, n // 2)
        rows = [row for row in rows.tolist() if not self.reads_all(row + 1)]
        if not rows:
            raise ValueError(f"hylra was given samples of {n} tokens, which its budget of {self.budget} reads whole: give longer ones")
        weights = row_probabilities(q, k, torch.tensor(rows, device=q.device), scale=ctx.scale, softcap=ctx.softcap)
        scored = torch.zeros(batch, len(rows), math.ceil(n / self.block), dtype=torch.bool, device=q.device)
        error, divergence = (torch.zeros((), dtype=torch.float64, device=q.device) for _ in range(2))
        for i, row in enumerate(rows):
            p, seen = weights[:, :, i, : row + 1], row + 1
            chosen = self._blocks(p)
            # the recent ones are read whatever the scores are: they say nothing about similarity
            scored[:, i].scatter_(-1, chosen[:, 0, : max(0, self.pages(seen) - self.recent)], True)
            kept = p * read_pages(chosen, self.block, seen).coverage()[:, :, 0]
            mass = kept.sum(-1, keepdim=True)
            dense = weighted_values(p, v[:, :, :seen])
            change = weighted_values(kept / mass, v[:, :, :seen]) - dense
            error += (change.flatten(1).norm(dim=-1) / dense.flatten(1).norm(dim=-1)).double().sum()
            divergence -= mass.double().log().mean((1, 2)).sum()
        sets: dict[int, Tensor] = ctx.shared.setdefault("sets", {})
        overlap = torch.zeros(ctx.layers, dtype=torch.float64)
        for layer, other in sets.items():
            common, own = (other & scored).sum(-1), scored.sum(-1)
            overlap[layer] = torch.where(own > 0, common / own.clamp(min=1), 1.0).double().sum()
        sets[ctx.layer] = scored
        return {"overlap": overlap, "error": error, "divergence": divergence, "rows": torch.tensor(float(batch * len(rows)))}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.conclude_all({0: sums})[0]

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """role; and what it was concluded from: error and divergence, scalars, and overlap `(layers,)`, M of every earlier layer."""
        layers = sorted(sums)
        means = {j: {name: x.cpu() / sums[j]["rows"].cpu() for name, x in sums[j].items() if name != "rows"} for j in layers}
        similarity = torch.stack([means[j]["overlap"][layers] for j in layers], dim=1)
        limits = {"error": self.max_error, "divergence": self.max_divergence}
        forced = [i for i, j in enumerate(layers) if any(float(means[j][name]) > limit for name, limit in limits.items())]
        sources = cheapest_reuse(similarity, self.theta, forced)
        roles: dict[int, LayerPolicy] = {}
        for i, layer in enumerate(layers):
            followed = i in sources[i + 1 :]
            roles[layer] = layers[sources[i]] if sources[i] != i else "select" if followed else "dense"
        return {layer: {**found, **means[layer]} for layer, found in planned_roles(roles).items()}

    # -- at run time -------------------------------------------------------------------------------------------------------

    def role(self, ctx: LayerContext) -> LayerPolicy:
        return found_role(ctx)

    def pages(self, n: int) -> int:
        """Blocks of n tokens that are read."""
        tokens = Budget.of(self.budget).tokens(n)
        return math.ceil(n / self.block) if tokens >= n else max(1, tokens // self.block)

    def reads_all(self, n: int) -> bool:
        return math.ceil(n / self.block) <= self.pages(n)

    def _blocks(self, weights: Tensor) -> Tensor:
        """The blocks that attention `(B, Hq, n)` of one query asks for, int64 `(B, 1, count)` ascending."""
        sums = page_sums(weights.mean(1, keepdim=True), self.block)
        return best_pages(sums, self.pages(weights.shape[-1]), self.recent)

    def choose(self, ctx: LayerContext, logits: Tensor) -> Selection:
        return read_pages(self._blocks(logits.softmax(-1)), self.block, logits.shape[-1])

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        if ctx.phase == "decode":
            return super().select(ctx, q, k, v)
        # a prompt: the rows of a tile of `block` queries choose together
        sums = pooled_probabilities(q, k, self.block, self.block, scale=ctx.scale, softcap=ctx.softcap).mean(1, keepdim=True)
        grid = TileGrid.of(q, k, self.block, self.block)
        return choose_tiles(sums, self.budget, grid, local=(self.recent - 1) * self.block + 1)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ctx.phase == "decode":
            return super().attend(ctx, q, k, v)
        role = self.role(ctx)
        if role == "dense" or q.shape[2] == 1 or self.reads_all(k.shape[2]):
            return ctx.attend(q, k, v, None)
        if role != "select":
            return ctx.attend(q, k, v, ctx.published(role))
        # two more passes over the scores, each half of a pair's work; a GPU wants a dense kernel that sums its probabilities by tile
        n_q, n_k = q.shape[2], k.shape[2]
        ctx.count(n_q * n_k - n_q * (n_q - 1) / 2)
        ctx.publish(self.select(ctx, q, k, v))
        return ctx.attend(q, k, v, None)
