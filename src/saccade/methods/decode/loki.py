"""Loki: keys live near a subspace, so their leading principal coordinates tell which tokens deserve exact attention.

Offline, the second moment of each key head's keys gives an orthogonal basis P, columns by decreasing variance. Since
P is orthogonal, (q P).(k P) = q.k; the first d of the D terms alone give the approximate logits

    a_t = (q P)[:d] . (k_t P)[:d] / sqrt(D),

whose best positions (the factor does not change which) get exact attention with all D channels of the keys.
Source: loki, arXiv 2406.02542.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Budget, Calibrated, Decode, Info, LayerContext, Mass, Selection, Threshold, register
from saccade.ops.estimate import Reduce
from saccade.parts.dots import dots
from saccade.parts.growing import Growing
from saccade.parts.heads import check_reduction
from saccade.parts.pca import dims_for, principal_basis, second_moment
from saccade.parts.pick import pick_best, read_tokens
from saccade.parts.placed import placed


@register
@dataclass(frozen=True, kw_only=True)
class Loki(Decode, Calibrated):
    """dims: leading coordinates d used for ranking, as a share of the head dim D (float) or a number (int).
    variance: instead of dims, the fewest coordinates of each layer that hold this share of the keys' variance in
        every head.
    budget: tokens read per step and query head (int), or their share (float) of the entries the layer holds.
    reduce: "none" as in the paper; "group_max" and "group_sum" choose once for the query heads that share a key head, by the highest
        or the summed a_t, so that a token is loaded once.

    The paper replaces the cached keys by k P and reads their first d channels in place. Here the cache keeps its
    keys and the first d coordinates are stored beside them, contiguously: the cache is not smaller, and the index
    costs d / D of the keys.
    """

    dims: float | int = 0.25
    variance: float | None = None
    budget: float | int = 0.25
    reduce: Reduce = "none"

    info = Info(
        slug="loki", phase="decode", reads_encoded=True, recordable=True, needs=frozenset({"calibration"}), opened={"budget": 1.0},
        tiny={"dims": 0.5, "budget": 0.25},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        whole = isinstance(self.dims, int) and not isinstance(self.dims, bool)
        if not (whole and self.dims >= 1) and not (isinstance(self.dims, float) and 0 < self.dims <= 1):
            raise ValueError(f"loki got dims={self.dims!r}: expected a share of the head dim in (0, 1], or a number")
        if self.variance is not None and not (isinstance(self.variance, int | float) and 0 < self.variance <= 1):
            raise ValueError(f"loki got variance={self.variance!r}: expected a share in (0, 1], or None")
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("loki reads a fixed number of tokens: its budget is a ratio or a number of tokens")
        check_reduction("loki", self.reduce)

    # -- offline -------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"moment": second_moment(k)}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """basis `(Hk, D, D)`, and the share of variance its first columns hold, `(Hk, D)`."""
        basis, explained = principal_basis(sums["moment"])
        return {"basis": basis, "explained": explained}

    # -- decoding ------------------------------------------------------------------------------------------------------

    def leading(self, ctx: LayerContext, like: Tensor) -> Tensor:
        """The leading columns of the basis, `(Hk, D, d)` in the dtype of the model: coordinates are kept in it, and only rank tokens."""
        basis = ctx.found("basis")
        if self.variance is not None:
            d = dims_for(ctx.found("explained"), self.variance)
        else:
            d = round(self.dims * basis.shape[-1]) if isinstance(self.dims, float) else self.dims
        return placed(basis, like.device, like.dtype, max(1, d))

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        new = k @ self.leading(ctx, k)
        if "coordinates" in ctx.state:
            ctx.state["coordinates"].append(new)
        else:
            ctx.state["coordinates"] = Growing(new)

    def rewind(self, ctx: LayerContext, n: int) -> int:
        if "coordinates" not in ctx.state:
            return 0
        ctx.state["coordinates"].truncate(n)
        return ctx.state["coordinates"].n

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        stored = ctx.state["coordinates"].view
        n = stored.shape[2]
        turned = (ctx.layout.to_groups(q.squeeze(2)) @ self.leading(ctx, q)).flatten(1, 2)
        return read_tokens(pick_best(dots(turned, stored, self.reduce), Budget.of(self.budget).tokens(n)), n)
