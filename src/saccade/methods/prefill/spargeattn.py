"""SpargeAttn: blocks are chosen by their mean tokens where a block is uniform enough, and always read where it is not.

    p, c     = mean and mean pairwise cosine of a block of tokens (keys less their mean)
    P        = softmax(scale * p_q p_k^T)            over the visible key blocks with c > theta
    block pair is read  iff  among the best of its row (below), or c_q <= theta, or c_k <= theta, or it is the first key block
    best     = floor(top_k * key blocks), or with top_p the largest set whose P does not exceed top_p; one at least

What is read runs with 8-bit products q.k; a tile all of whose rows lie more than 2^skip below what they have already is left out after
them. Offline, each head gets its own top_p and theta (`saccade calibrate spargeattn`). Images and videos gain from tokens in the order of
`saccade.parts.hilbert.hilbert_order`. Decoding is dense.

Source: spargeattn, arXiv 2502.18137, sections 3.2 to 3.6 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saccade.core import Calibrated, Info, LayerContext, Prefill, Selection, register
from saccade.ops.estimate import TileGrid, block_statistics, choose_top_k
from saccade.ops.estimate.reference import products
from saccade.parts.bisect import bisect
from saccade.parts.crossing import count_within
from saccade.parts.placed import placed

STEPS = 6  # of each bisection of the tuner: top_p to 1 / 64
WIDEST_SKIP = 64.0  # 2^-64 of a row's sum is nothing in float32
LEAST_SPARSITY = 0.1  # a head that can leave out less is read densely


class Pooled(NamedTuple):
    """scores: `(B, Hq, Tq, Tk)`, logits of mean tokens, -inf where invisible. likeness of query and key blocks: `(B, Hq, Tq or Tk)`."""

    scores: Tensor
    of_queries: Tensor
    of_keys: Tensor


@register
@dataclass(frozen=True, kw_only=True)
class SpargeAttention(Prefill, Calibrated):
    """Blocks are chosen for each query head. top_p and theta come from the plan, else from the fields.

    top_k: share of all key blocks that a query block chooses, in (0, 1]; causal rows have fewer. top_p: share of the pooled attention
    instead, in (0, 1] (the paper's 0.98 goes with theta 0.6). theta: blocks with a mean pairwise cosine up to this are always read;
    -1 trusts all, 1 none. skip: lambda of the filter, in base-2 exponents, >= 0; None: no filter. first: always read the first key block.
    qk: numbers of the products q.k, "int8", "fp8", or "same": the dtype of q, without a filter; "auto": int8, as in the paper, on GPUs,
    which multiply them faster, and "same" elsewhere. block_q, block_k: tokens; powers of two from 32 to 256 unless qk is "same".
    l1, l2: relative L1 errors of a head's output that the tuner allows before and after the filter. thetas: values of theta
    that the tuner tries, evenly spread over [-1, 1).
    """

    top_k: float = 0.5
    top_p: float | None = None
    theta: float = -0.1
    skip: float | None = 50.0
    first: bool = True
    qk: Literal["auto", "int8", "fp8", "same"] = "auto"
    block_q: int = 128
    block_k: int = 64
    l1: float = 0.08
    l2: float = 0.09
    thetas: int = 32

    info = Info(
        slug="spargeattn", phase="prefill", opened={"top_k": 1.0, "qk": "same"},
        tiny={"top_k": 0.2, "theta": -0.9, "block_q": 32, "block_k": 32},
        opts_out={
            "chunked": "blocks of queries begin with each chunk, and the mean key that is taken off is that of the keys so far",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "the mean key that is taken off is over the whole prompt; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            if not (name == "top_p" and value is None) and not _number(value, 0, 1, open_low=True):
                raise ValueError(f"spargeattn({name}={value!r}) is not a share above 0 and at most 1")
        if not _number(self.theta, -1, 1):
            raise ValueError(f"spargeattn(theta={self.theta!r}) is not a cosine from -1 to 1")
        if self.skip is not None and not _number(self.skip, 0, float("inf")):
            raise ValueError(f"spargeattn(skip={self.skip!r}) is neither None nor a number of binary exponents from 0 on")
        if not isinstance(self.first, bool):
            raise ValueError(f"spargeattn(first={self.first!r}) is not True or False")
        if self.qk not in ("auto", "int8", "fp8", "same"):
            raise ValueError(f"spargeattn(qk={self.qk!r}) is not one of auto, int8, fp8, same")
        for name in ("block_q", "block_k", "thetas"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"spargeattn({name}={value!r}) is not a whole number of at least 1")
        for name in ("l1", "l2"):
            if not _number(getattr(self, name), 0, float("inf")):
                raise ValueError(f"spargeattn({name}={getattr(self, name)!r}) is not an error from 0 on")

    # -- online ------------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        top_p, theta = self._settings(ctx, q)
        return self._choose(self._pool(ctx, q, k), top_p, theta, q, k)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1:
            return ctx.attend(q, k, v, None)
        whole = ctx.plan is None and (self.top_k if self.top_p is None else self.top_p) == 1
        skip = self.skip if ctx.plan is None else float(ctx.found("skip"))
        return self._run(ctx, q, k, v, None if whole else self.select(ctx, q, k, v), skip)

    def _settings(self, ctx: LayerContext, q: Tensor) -> tuple[Tensor | None, Tensor]:
        """(top_p or None, theta) of each query head, float64 `(Hq,)`."""
        if ctx.plan is None:
            one = torch.ones(q.shape[1], dtype=torch.float64, device=q.device)
            return None if self.top_p is None else self.top_p * one, self.theta * one
        top_p, theta = (placed(ctx.found(name), q.device, torch.float64) for name in ("top_p", "theta"))
        if top_p.shape != (q.shape[1],):
            raise ValueError(f"this spargeattn plan is for {len(top_p)} heads, layer {ctx.layer} has {q.shape[1]}: calibrate this model")
        return top_p, theta

    def _pool(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Pooled:
        p_q, c_q = block_statistics(q, self.block_q)
        p_k, c_k = block_statistics(k, self.block_k, shift=k.mean(2, dtype=p_q.dtype))
        scores = products(p_q * ctx.scale, p_k)
        if ctx.softcap is not None:
            scores = ctx.softcap * torch.tanh(scores / ctx.softcap)
        visible = TileGrid.of(q, k, self.block_q, self.block_k).visible(q.device)
        return Pooled(scores.masked_fill_(~visible, -torch.inf), c_q, c_k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))

    def _choose(self, pooled: Pooled, top_p: Tensor | None, theta: Tensor, q: Tensor, k: Tensor) -> Selection:
        """top_p, theta: float64 `(Hq,)`."""
        limit = theta.to(pooled.scores.dtype).unsqueeze(-1)
        fixed_q, fixed_k = ((pooled.of_queries <= limit).unsqueeze(-1), (pooled.of_keys <= limit).unsqueeze(-2))
        # a row without any block to trust has no softmax: all of its blocks are fixed
        share = pooled.scores.masked_fill(fixed_k, -torch.inf).softmax(-1).nan_to_num_(0.0)
        forced = fixed_q | fixed_k
        if self.first:
            forced = forced | (torch.arange(share.shape[-1], device=q.device) == 0)
        if top_p is None:
            counts: int | Tensor = max(1, int(self.top_k * share.shape[-1] + 1e-9))
        else:
            counts = count_within(share, top_p[:, None])
        grid = TileGrid.of(q, k, self.block_q, self.block_k)
        return choose_top_k(share, counts, grid, forced=forced.expand(share.shape), inside=False)

    def _plain(self, q: Tensor) -> bool:
        """Whether products are in the dtype of q."""
        return self.qk == "same" or (self.qk == "auto" and not q.is_cuda)

    def _run(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, skip: float | None) -> Tensor:
        if self._plain(q):
            return ctx.attend(q, k, v, selection)
        from saccade.ops.attend import attend_low_bit

        numbers = "int8" if self.qk == "auto" else self.qk
        return ctx.attend(
            q, k, v, selection, run=attend_low_bit, qk=numbers, block_q=self.block_q, block_k=self.block_k, skip_below=skip
        )

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """For each theta tried: "top_p", the smallest that keeps the error of a head below l1, and the "sparsity" it gives, `(Hq, T)`.

        "skip" `(1,)`: the smallest filter of all heads together that keeps their errors below l2, each at its best theta of this sample.
        "samples" `(1,)`. Float64; a batch counts as one sample.
        """
        dense, pooled = ctx.attend(q, k, v, None), self._pool(ctx, q, k)
        norm = dense.abs().sum((0, 2, 3), dtype=torch.float64)

        def error(selection: Selection, skip: float | None) -> Tensor:
            return (self._run(ctx, q, k, v, selection, skip) - dense).abs().sum((0, 2, 3), dtype=torch.float64) / norm

        zero = torch.zeros(q.shape[1], dtype=torch.float64, device=q.device)
        top_p, sparsity = [], []
        for theta in self._grid():
            cut = torch.full_like(zero, theta)
            found = bisect(lambda p, cut=cut: error(self._choose(pooled, p, cut, q, k), None) < self.l1, zero, zero + 1, STEPS)
            top_p.append(found)
            sparsity.append(1 - self._choose(pooled, found, cut, q, k).density_by_head().mean(0))
        sums = {"top_p": torch.stack(top_p, dim=-1), "sparsity": torch.stack(sparsity, dim=-1)}
        chosen = self._choose(pooled, *self._best(sums["top_p"], sums["sparsity"]), q, k)
        skip = zero[:1] + WIDEST_SKIP
        if not self._plain(q):
            skip = bisect(lambda s: (error(chosen, float(s)) < self.l2).all().expand(1), zero[:1], skip, STEPS)
        return {**sums, "skip": skip, "samples": torch.ones_like(skip)}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """"top_p", "theta" `(Hq,)` and "skip" `(1,)`, float64, means over the samples at the theta with the sparsest neighbourhood."""
        top_p, theta = self._best(sums["top_p"] / sums["samples"], sums["sparsity"] / sums["samples"])
        return {"top_p": top_p, "theta": theta, "skip": sums["skip"] / sums["samples"]}

    def _grid(self) -> list[float]:
        return [-1 + 2 * i / self.thetas for i in range(self.thetas)]

    def _best(self, top_p: Tensor, sparsity: Tensor) -> tuple[Tensor, Tensor]:
        """(top_p, theta) of each head where theta and its neighbours are sparsest together; top_p 1 for a head that is too dense there."""
        edges = torch.nn.functional.pad(sparsity, (1, 1), mode="replicate")
        best = edges.unfold(-1, 3, 1).sum(-1).argmax(-1, keepdim=True)
        thetas = torch.tensor(self._grid(), dtype=torch.float64, device=top_p.device).expand(top_p.shape)
        found, theta, least = (torch.gather(x, -1, best).squeeze(-1) for x in (top_p, thetas, sparsity))
        return found.masked_fill(least < LEAST_SPARSITY, 1.0), theta


def _number(value: object, low: float, high: float, *, open_low: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and not (open_low and value == low)
