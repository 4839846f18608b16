"""HyperAttention: hashing puts queries next to the keys they match, so heavy entries lie in diagonal blocks; the rest is sampled.

    h(x)   = rank of sign(x R) in the Gray sequence,  R Gaussian, the same for q and k          angular hash
    core   : q and k sorted by h; a query block reads the key block beside it, and `samples` keys drawn uniformly with replacement,
             each standing for n / samples keys (log n / samples is added to its logit; none of its own block)
    causal(n) = exact if n <= min_length, else: causal of both halves, and core(queries of the second half, keys of the first),
             merged by log-sum-exp

Decoding is dense. The sample is the only randomness: it depends on the seed, the layer and the length.

Source: hyperattention, arXiv 2310.05869, sections 2 to 4 and algorithms 1 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core import Info, LayerContext, Partial, Prefill, Selection, merge, register
from saccade.ops.estimate.reference_lists import compact
from saccade.parts.lsh import angular_buckets
from saccade.parts.rows import pick_rows


@register
@dataclass(frozen=True, kw_only=True)
class HyperAttention(Prefill):
    """Each query head has its own sample; keys are sorted once for the query heads that share them.

    bits: Gaussian directions of the hash, 1 to 30. block: keys of a diagonal block, tokens. samples: keys drawn for each core.
    min_length: up to this many queries everything is exact. last: only the last so many layers are sparse, as in the paper's runs on
    trained models; None: all layers.
    """

    bits: int = 7
    block: int = 256
    samples: int = 256
    min_length: int = 4096
    last: int | None = None

    info = Info(
        slug="hyperattention", phase="prefill", opened={"min_length": 1 << 30},
        tiny={"bits": 3, "block": 8, "samples": 8, "min_length": 16},
        opts_out={
            "chunked": "the recursion halves what is given and blocks are made of its sorted rows, so a chunk has other blocks",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "which block a query falls into depends on the other queries of its half; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least, most in (("bits", 1, 30), ("block", 1, 1 << 30), ("samples", 1, 1 << 30), ("min_length", 1, 1 << 30)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"hyperattention({name}={value!r}) is not a whole number from {least} to {most}")
        if self.last is not None and (isinstance(self.last, bool) or not isinstance(self.last, int) or self.last < 0):
            raise ValueError(f"hyperattention(last={self.last!r}) is neither None nor a number of layers from 0 on")

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self._exact(ctx, q, k):
            return ctx.attend(q, k, v, None)
        n, past, generator = q.shape[2], k.shape[2] - q.shape[2], ctx.generator()
        halvings = self._halvings(n)
        # rows of padding come last: no row that counts sees them
        q2, k2, v2 = (_whole(x[:, :, -n:], 1 << halvings) for x in (q, k, v))
        leaves = [_stack(x, 1 << halvings) for x in (q2, k2, v2)]
        part = _unstack(ctx.partial(leaves[0], leaves[1], leaves[2], None), q.shape[0])
        for level in reversed(range(halvings)):
            pieces = 1 << level
            later = _stack(q2, pieces, half=1)
            core = self._core(ctx, later, _stack(k2, pieces, half=0), _stack(v2, pieces, half=0), pieces, generator)
            part = _merge_later(part, _unstack(core, q.shape[0]), pieces)
        part = Partial(part.out[:, :, :n], None if part.lse is None else part.lse[:, :, :n])
        if past:
            part = merge(part, self._core(ctx, q, k[:, :, :past], v[:, :, :past], 1, generator))
        return part.out

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What each row reads, without the weights of sampled keys: for pictures of short prompts, `N^2` bytes a head."""
        n, n_k, generator = q.shape[2], k.shape[2], ctx.generator()
        past = n_k - n
        if self._exact(ctx, q, k):
            return Selection.full(n, n_k, device=q.device)
        halvings = self._halvings(n)
        q2, k2 = (_whole(x[:, :, -n:], 1 << halvings) for x in (q, k))
        size = q2.shape[2]
        seen = torch.zeros(*q.shape[:2], size, past + size, dtype=torch.bool, device=q.device)
        leaf = size >> halvings
        for begin in range(0, size, leaf):
            seen[:, :, begin : begin + leaf, past + begin : past + begin + leaf] = True
        for level in reversed(range(halvings)):
            pieces, half = 1 << level, size >> level + 1
            masks = self._core_mask(_stack(q2, pieces, half=1), _stack(k2, pieces, half=0), pieces, generator)
            for piece, mask in enumerate(masks.unflatten(0, (-1, pieces)).unbind(1)):
                rows, keys = (2 * piece + 1) * half, past + 2 * piece * half
                seen[:, :, rows : rows + half, keys : keys + half] = mask
        if past:
            seen[:, :, :n, :past] = self._core_mask(q, k[:, :, :past], 1, generator)
        return Selection.from_token_mask(seen[:, :, :n, :n_k], block_q=1, n_q=n)

    def _exact(self, ctx: LayerContext, q: Tensor, k: Tensor) -> bool:
        skipped = self.last is not None and ctx.layer < ctx.layers - self.last
        return skipped or q.shape[2] <= self.min_length

    def _halvings(self, n: int) -> int:
        """How often n rows are halved until the pieces are exact."""
        count = 0
        while -(-n >> count) > self.min_length:
            count += 1
        return count

    def _core(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, pieces: int, generator: torch.Generator) -> Partial:
        """Every query to every key, without causality: diagonal blocks in sorted order and sampled keys."""
        if q.shape[2] < self.min_length:
            return ctx.partial(q, k, v, None, causal=False)
        selection, rows, keys = self._sorted(q, k, pieces, generator)
        part = ctx.partial(pick_rows(q, rows), pick_rows(k, keys), pick_rows(v, keys), selection)
        assert part.lse is not None
        places = torch.arange(rows.shape[-1], device=rows.device).expand_as(rows)
        back = torch.empty_like(rows).scatter_(-1, rows, places)
        return Partial(pick_rows(part.out, back), torch.gather(part.lse, -1, back))

    def _core_mask(self, q: Tensor, k: Tensor, pieces: int, generator: torch.Generator) -> Tensor:
        """bool `(B, Hq, Nq, Nk)`: the keys that the core reads."""
        if q.shape[2] < self.min_length:
            return torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
        selection, rows, keys = self._sorted(q, k, pieces, generator)
        listed = selection.expand(*q.shape[:2]).dense_mask()
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1).unsqueeze(2).expand(listed.shape)
        by_key = torch.zeros_like(listed).scatter_(3, keys, listed)
        return torch.zeros_like(listed).scatter_(2, rows.unsqueeze(-1).expand(listed.shape), by_key)

    def _sorted(self, q: Tensor, k: Tensor, pieces: int, generator: torch.Generator) -> tuple[Selection, Tensor, Tensor]:
        """(what sorted queries read of sorted keys, query order `(B, Hq, Nq)`, key order `(B, Hk, Nk)`)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        directions = torch.randn(q.shape[-1], self.bits, generator=generator, dtype=torch.float64).to(q.device, wide)
        # a code has few bits: as a narrow number it is sorted in fewer passes
        narrow = torch.int16 if self.bits < 16 else torch.int32
        rows, keys = (torch.sort(angular_buckets(x, directions).to(narrow), dim=-1, stable=True).indices for x in (q, k))
        n_q, n_k = q.shape[2], k.shape[2]
        blocks = -(-n_k // self.block)
        block_q = -(-n_q // blocks)
        tiles = -(-n_q // block_q)
        # rows of a batch draw the same places in their own sorted orders, pieces and heads different ones
        drawn = torch.randint(n_k, (pieces, q.shape[1], self.samples), generator=generator).to(q.device)
        tokens, counts, weight = self._sample(drawn, tiles, n_k)
        tokens, counts, weight = (x.repeat(q.shape[0] // pieces, *(1,) * (x.ndim - 1)) for x in (tokens, counts, weight))
        starts = (torch.arange(tiles, device=q.device, dtype=torch.int32) * self.block).view(1, 1, -1, 1).expand(*tokens.shape[:3], 1)
        selection = Selection(
            n_q=n_q, n_k=n_k, block_q=block_q, block_k=self.block, causal=False, starts=starts, start_counts=torch.ones_like(counts),
            tokens=tokens, token_counts=counts, log_weight=weight,
        )  # fmt: skip
        return selection, rows, keys

    def _sample(self, drawn: Tensor, tiles: int, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places drawn with replacement, `(pieces, H, samples)`, as the ascending keys of each tile, their number and the logarithm of how
        many keys each stands for. A key of the tile's own block is read there, without a weight."""
        drawn = drawn.sort(-1).values
        repeats = torch.searchsorted(drawn, drawn, right=True) - torch.searchsorted(drawn, drawn)
        logs = (torch.arange(1, self.samples + 1) * (n_k / self.samples)).log().to(drawn.device)
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
        own = torch.arange(tiles, device=drawn.device).unsqueeze(-1)
        keep = first.unsqueeze(2) & ((drawn // self.block).unsqueeze(2) != own)
        which = compact(torch.arange(self.samples, device=drawn.device), keep, self.samples).long()
        tokens, weight = pad(drawn, (0, 1), value=n_k).to(torch.int32), pad(logs[repeats - 1], (0, 1))
        listed = (x.unsqueeze(2).expand(-1, -1, tiles, -1).gather(-1, which) for x in (tokens, weight))
        return next(listed), keep.sum(-1, dtype=torch.int32), next(listed)


def _whole(x: Tensor, pieces: int) -> Tensor:
    """x `(B, H, N, D)` with rows of zeros behind, so that N is a multiple of `pieces`; itself where it is."""
    more = -x.shape[2] % pieces
    return pad(x, (0, 0, 0, more)) if more else x


def _stack(x: Tensor, pieces: int, half: int | None = None) -> Tensor:
    """`(B, H, N, D)` cut into equal pieces (or one half of each), as more rows of the batch: `(B * pieces, H, n, D)`."""
    cut = x.unflatten(2, (pieces, -1)) if half is None else x.unflatten(2, (pieces, 2, -1))[:, :, :, half]
    return cut.transpose(1, 2).flatten(0, 1)


def _unstack(part: Partial, batch: int) -> Partial:
    """The inverse of `_stack` for whole pieces."""
    assert part.lse is not None
    out, lse = (x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for x in (part.out, part.lse))
    return Partial(out, lse)


def _merge_later(part: Partial, core: Partial, pieces: int) -> Partial:
    """`part` with the second half of each piece merged with the core's rows."""
    assert part.lse is not None
    out, lse = (x.unflatten(2, (pieces, 2, -1)) for x in (part.out, part.lse))
    both = merge(Partial(out[:, :, :, 1].flatten(2, 3), lse[:, :, :, 1].flatten(2, 3)), core)
    assert both.lse is not None
    later = (x.unflatten(2, (pieces, -1)) for x in (both.out, both.lse))
    out, lse = (torch.stack([x[:, :, :, 0], y], dim=3).flatten(2, 4) for x, y in zip((out, lse), later, strict=True))
    return Partial(out, lse)
