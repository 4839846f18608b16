"""Selection: which keys each query reads. The one intermediate form of all sparsity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from saccade.core.keymajor import KeyMajor, transpose
from saccade.core.mass import covered_mass
from saccade.core.tilemath import cover, fill_past, list_true, listed_pairs, mark, row_tiles, sorted_unique


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Query tile t (rows `t*block_q ... (t+1)*block_q - 1`) reads the key tiles and the single keys listed for it.

    A query reads key j iff j lies in a listed tile or is itself listed, and j is visible to it. With `causal` a query i sits at
    position `n_k - n_q + i` and sees the keys up to its own position. Selectors produce this, executors consume it, reports draw it.

    starts: `(B, H, Tq, M)` int32, sorted, disjoint first keys of the tiles; start_counts `(B, H, Tq)` says how many are real.
    tokens: `(B, H, Tq, M')` int32, sorted single keys outside those tiles; token_counts `(B, H, Tq)`.
    log_weight: like tokens, float32, added to the logits of those keys (importance weights, merged counts).
    Entries past a count hold n_k. H is the number of query heads, of key/value heads (shared by a group) or 1; B may be 1 for
    a pattern shared by the batch. aligned: every start is a multiple of block_k.

    tokens, and log_weight with them, may also be one list for all query tiles, `(B, H, 1, M')`: tile t reads its first
    `token_counts[..., t]` entries, and nothing is said by those after them; entries past the longest count hold n_k. Who reads token
    lists goes by the counts, or asks `tokens_of` or `own_lists`.

    Use the constructors below, or `from_parts`, which sorts, removes duplicates and validates; both give every tile a list of its own.
    """

    n_q: int
    n_k: int
    block_q: int
    block_k: int
    starts: Tensor
    start_counts: Tensor
    tokens: Tensor
    token_counts: Tensor
    log_weight: Tensor | None = None
    causal: bool = True
    aligned: bool = True

    # -- constructors ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_parts(
        cls,
        *,
        n_q: int,
        n_k: int,
        block_q: int,
        block_k: int = 1,
        starts: Tensor | None = None,
        start_counts: Tensor | None = None,
        tokens: Tensor | None = None,
        token_counts: Tensor | None = None,
        log_weight: Tensor | None = None,
        causal: bool = True,
    ) -> Selection:
        """A Selection from unsorted lists; entries outside [0, n_k) are dropped, keys named twice are kept once.

        A key in both a tile and the token list is read through the tile (its log_weight does not apply).
        Raises ValueError when a shape does not fit n_q and block_q, or when tiles overlap.
        """
        if block_q < 1 or block_k < 1 or n_q < 0 or n_k < 0:
            raise ValueError(f"tiles of {block_q} x {block_k} over {n_q} queries and {n_k} keys: sizes must be positive")
        tiles = math.ceil(n_q / block_q)
        given = starts if starts is not None else tokens
        if given is None:
            raise ValueError("a Selection needs tile starts, single tokens, or both: none was given")
        for name, ids in (("starts", starts), ("tokens", tokens)):
            if ids is not None and (ids.ndim != 4 or ids.shape[2] != tiles):
                raise ValueError(
                    f"{name} has shape {tuple(ids.shape)}: expected (B, H, {tiles}, M) for {n_q} queries in tiles of {block_q}"
                )
        if log_weight is not None and (tokens is None or log_weight.shape != tokens.shape):
            raise ValueError("log_weight must have the shape of tokens")
        empty = torch.full((*given.shape[:3], 0), n_k, dtype=torch.int32, device=given.device)
        starts, start_counts, _ = sorted_unique(empty if starts is None else starts, start_counts, None, n_k)
        if starts.shape[-1] > 1:
            gaps = torch.where(starts[..., 1:] < n_k, starts[..., 1:] - starts[..., :-1], block_k)
            if bool((gaps < block_k).any()):
                raise ValueError(f"key tiles of {block_k} overlap: starts must be at least {block_k} apart")
        tokens, token_counts, log_weight = sorted_unique(empty if tokens is None else tokens, token_counts, log_weight, n_k)
        if tokens.shape[-1] and starts.shape[-1]:
            starts, tokens = _same_leading(starts, tokens)
            log_weight = None if log_weight is None else log_weight.expand(tokens.shape)
            before = torch.searchsorted(starts.contiguous(), tokens.contiguous(), right=True) - 1
            tile = torch.gather(starts, -1, before.clamp(min=0)).long()
            inside = (before >= 0) & (tokens.long() < tile + block_k)
            tokens, token_counts, log_weight = sorted_unique(tokens.masked_fill(inside, n_k), None, log_weight, n_k)
            start_counts = start_counts.expand(starts.shape[:3])
        return cls(
            n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, starts=starts, start_counts=start_counts, tokens=tokens,
            token_counts=token_counts, log_weight=log_weight, causal=causal,
            aligned=not bool(((starts % block_k != 0) & (starts < n_k)).any()),
        )  # fmt: skip

    @classmethod
    def from_block_mask(cls, mask: Tensor, *, block_q: int, block_k: int, n_q: int, n_k: int, causal: bool = True) -> Selection:
        """From a bool mask over tiles, `(B, H, ceil(n_q/block_q), ceil(n_k/block_k))`; wholly invisible tiles are dropped."""
        expected = (math.ceil(n_q / block_q), math.ceil(n_k / block_k))
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected or mask.dtype != torch.bool:
            raise ValueError(f"block mask is {mask.dtype} {tuple(mask.shape)}: expected bool (B, H, {expected[0]}, {expected[1]})")
        if causal:
            _, last = row_tiles(n_q, block_q, n_k - n_q, mask.device)
            mask = mask & (torch.arange(expected[1], device=mask.device) * block_k < last[:, None])
        ids, counts = list_true(mask)
        starts = fill_past(ids * block_k, counts, n_k)
        none = starts[..., :0]
        return cls(
            n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, starts=starts, start_counts=counts, tokens=none,
            token_counts=torch.zeros_like(counts), causal=causal,
        )  # fmt: skip

    @classmethod
    def from_token_mask(cls, mask: Tensor, *, block_q: int, n_q: int, block_k: int = 1, causal: bool = True) -> Selection:
        """From a bool mask over single keys for each query tile, `(B, H, ceil(n_q/block_q), n_k)`.

        With block_k > 1, aligned runs of block_k keys that are all listed become tiles; the other keys stay single.
        """
        if mask.ndim != 4 or mask.shape[2] != math.ceil(n_q / block_q) or mask.dtype != torch.bool:
            raise ValueError(f"token mask is {mask.dtype} {tuple(mask.shape)}: expected bool (B, H, {math.ceil(n_q / block_q)}, n_k)")
        n_k = mask.shape[-1]
        if causal:
            _, last = row_tiles(n_q, block_q, n_k - n_q, mask.device)
            mask = mask & (torch.arange(n_k, device=mask.device) < last[:, None])
        whole = mask.new_zeros(*mask.shape[:3], 0)
        if block_k > 1:
            padded = torch.nn.functional.pad(mask, (0, -n_k % block_k), value=True)
            whole = padded.unflatten(-1, (-1, block_k)).all(-1)
            # a last tile that is all padding plus listed keys is whole too; one made of padding alone can't occur
            mask = mask & ~whole.repeat_interleave(block_k, dim=-1)[..., :n_k]
        blocks, start_counts = list_true(whole)
        tokens, token_counts = list_true(mask)
        starts = fill_past(blocks * block_k, start_counts, n_k)
        return cls(
            n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, starts=starts, start_counts=start_counts, tokens=tokens,
            token_counts=token_counts, causal=causal,
        )  # fmt: skip

    @classmethod
    def from_positions(
        cls, tokens: Tensor, *, n_q: int, n_k: int, block_q: int = 1, counts: Tensor | None = None,
        log_weight: Tensor | None = None, causal: bool = True,
    ) -> Selection:  # fmt: skip
        """From single key ids `(B, H, ceil(n_q/block_q), m)` in any order, optionally ragged by `counts (B, H, Tq)`."""
        return cls.from_parts(
            n_q=n_q, n_k=n_k, block_q=block_q, tokens=tokens, token_counts=counts, log_weight=log_weight, causal=causal
        )

    @classmethod
    def full(
        cls, n_q: int, n_k: int, *, block_q: int = 128, block_k: int = 128, causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> Selection:  # fmt: skip
        """Every visible key; B and H are 1."""
        mask = torch.ones(1, 1, math.ceil(n_q / block_q), math.ceil(n_k / block_k), dtype=torch.bool, device=device)
        return cls.from_block_mask(mask, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)

    @classmethod
    def window(
        cls, n_q: int, n_k: int, size: int, *, sinks: int = 0, block_q: int = 128, block_k: int = 128, causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> Selection:  # fmt: skip
        """The last `size` keys before and at each query, and the first `sinks` keys; B and H are 1.

        All rows of a query tile read what any of them needs, so with block_q > 1 early rows' windows are up to block_q - 1 wider.
        """
        if size < 1 or sinks < 0:
            raise ValueError(f"window of {size} keys with {sinks} sinks: the window must be at least 1 and the sinks at least 0")
        first, last = row_tiles(n_q, block_q, n_k - n_q, torch.device(device))
        keys = torch.arange(n_k, device=device)
        mask = (keys > (first - size)[:, None]) & (keys < last[:, None]) | (keys < sinks)
        return cls.from_token_mask(mask[None, None], block_q=block_q, n_q=n_q, block_k=block_k, causal=causal)

    # -- facts -------------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return max(self.starts.shape[0], self.tokens.shape[0])

    @property
    def heads(self) -> int:
        return max(self.starts.shape[1], self.tokens.shape[1])

    @property
    def tiles(self) -> int:
        """Number of query tiles."""
        return math.ceil(self.n_q / self.block_q)

    @property
    def offset(self) -> int:
        """Position of query 0 when causal."""
        return self.n_k - self.n_q

    @property
    def device(self) -> torch.device:
        return self.starts.device

    @property
    def one_list(self) -> bool:
        """Whether the query tiles read the front parts of one token list."""
        return self.tokens.shape[2] != self.token_counts.shape[2]

    def tokens_of(self, tiles: slice | Tensor) -> Tensor:
        """The single keys of some query tiles, a list for each: `(B, H, tiles, M')`, past its count n_k."""
        if not self.one_list:
            return self.tokens[:, :, tiles]
        return fill_past(self.tokens, self.token_counts[:, :, tiles], self.n_k)

    def own_lists(self) -> Selection:
        """The same with a token list for each query tile; itself where it has them. For consumers that can afford the memory."""
        if not self.one_list:
            return self
        tokens = self.tokens_of(slice(None))
        return replace(self, tokens=tokens, log_weight=None if self.log_weight is None else self.log_weight.expand(tokens.shape))

    def coverage(self) -> Tensor:
        """Keys listed for each query tile, before causality: `(B, H, Tq, n_k)` bool. Memory n_q*n_k/block_q bytes a head."""
        return cover(self.starts, self.block_k, self.n_k) | mark(self.tokens_of(slice(None)), self.n_k)

    def dense_mask(self) -> Tensor:
        """`(B, H, n_q, n_k)` bool: the meaning of this object. For tests and small pictures only."""
        mask = self.coverage().repeat_interleave(self.block_q, dim=2)[:, :, : self.n_q]
        if self.causal:
            rows = torch.arange(self.n_q, device=self.device) + self.offset
            mask = mask & (torch.arange(self.n_k, device=self.device) <= rows[:, None])
        return mask

    def pairs(self) -> Tensor:
        """(query, key) score pairs that are read, int64 `(B, H)`, in closed form from the lists."""
        first, last = row_tiles(self.n_q, self.block_q, self.offset, self.device)
        if self.causal:
            tiles = listed_pairs(self.starts, self.start_counts, self.block_k, first, last, self.n_k, self.block_q)
            return tiles + listed_pairs(self.tokens, self.token_counts, 1, first, last, self.n_k, self.block_q)
        begin = self.starts.long()
        inside = ((begin + self.block_k).clamp(max=self.n_k) - begin).masked_fill(begin >= self.n_k, 0).sum(-1)
        return ((last - first) * inside).sum(-1) + ((last - first) * self.token_counts).sum(-1)

    def visible_pairs(self) -> int:
        """Pairs that dense attention would compute, per head."""
        if not self.causal:
            return self.n_q * self.n_k
        rows = torch.arange(self.n_q) + self.offset
        return int((rows + 1).clamp(min=0, max=self.n_k).sum())

    def density(self) -> float:
        """Score pairs computed / pairs visible, the mean over batch and heads, in [0, 1]."""
        return float(self.pairs().double().mean()) / max(self.visible_pairs(), 1)

    def density_by_head(self) -> Tensor:
        """Score pairs computed / pairs visible, float64 `(B, H)`."""
        return self.pairs().double() / max(self.visible_pairs(), 1)

    def mass(self, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
        """Attention mass covered: the mean over rows of the softmax probability on the selected keys, float32 `(B, Hq)`."""
        return covered_mass(self, q, k, scale).mean(-1)

    # -- other forms -------------------------------------------------------------------------------------------------------

    def transpose(self) -> KeyMajor:
        """Key-major lists: which query tiles read each key tile."""
        return transpose(self)

    def to_flex(self, batch: int, heads: int) -> BlockMask:
        """A torch FlexAttention BlockMask with the same meaning, for `batch` x `heads`; log_weight can't be expressed and is refused."""
        if self.log_weight is not None:
            raise ValueError("a selection with log weights has no FlexAttention form: use another implementation")
        whole = self.expand(batch, heads)
        coverage = whole.coverage()
        block_q, causal, offset = self.block_q, self.causal, self.offset

        def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            listed = coverage[b, h, row // block_q, key]
            return listed & (key <= row + offset) if causal else listed

        return create_block_mask(mask_mod, batch, heads, self.n_q, self.n_k, device=str(self.device))

    # -- algebra -----------------------------------------------------------------------------------------------------------

    def __or__(self, other: Selection) -> Selection:
        """Keys read by either. A key listed without a weight by one operand has weight 0; it may not carry two different ones."""
        return self._combine(other, union=True)

    def __and__(self, other: Selection) -> Selection:
        """Keys read by both; the weight of a single key stays, and a key may not carry two different ones."""
        return self._combine(other, union=False)

    def with_forced(self, sinks: int = 0, local: int = 0) -> Selection:
        """This selection plus the first `sinks` keys and each query tile's `local` most recent keys (every row's, itself included)."""
        if sinks < 0 or local < 0:
            raise ValueError(f"with_forced(sinks={sinks}, local={local}): both must be at least 0")
        if not sinks and not local:
            return self
        first, last = row_tiles(self.n_q, self.block_q, self.offset, self.device)
        keys = torch.arange(self.n_k, device=self.device)
        mask = keys < sinks
        mask = mask | ((keys > (first - local)[:, None]) & (keys < last[:, None])) if local else mask.expand(self.tiles, -1)
        block_k = self.block_k if self.aligned else 1
        return self | Selection.from_token_mask(
            mask[None, None], block_q=self.block_q, n_q=self.n_q, block_k=block_k, causal=self.causal
        )

    def _combine(self, other: Selection, *, union: bool) -> Selection:
        if (self.n_q, self.n_k, self.causal) != (other.n_q, other.n_k, other.causal):
            raise ValueError(
                f"selections over {self.n_q} x {self.n_k} (causal={self.causal}) and {other.n_q} x {other.n_k} "
                f"(causal={other.causal}) cannot be combined: they must cover the same queries and keys"
            )
        block_q = math.gcd(self.block_q, other.block_q)
        heads, batch = math.lcm(self.heads, other.heads), max(self.batch, other.batch)
        a, b = (s._refined(block_q).expand(batch, heads) for s in (self, other))
        mask = a.coverage() | b.coverage() if union else a.coverage() & b.coverage()
        block_k = math.gcd(a.block_k if a.aligned else 1, b.block_k if b.aligned else 1)
        weight = _combined_weight(a, b, union=union)
        if weight is not None:
            block_k = 1  # weights live on single keys, so every key is listed singly
        result = Selection.from_token_mask(mask, block_q=block_q, n_q=self.n_q, block_k=block_k, causal=self.causal)
        if weight is None:
            return result
        return replace(result, log_weight=torch.gather(weight, -1, result.tokens.long().clamp(max=self.n_k - 1)))

    def _refined(self, block_q: int) -> Selection:
        """The same selection in smaller query tiles (block_q divides this one's)."""
        if block_q == self.block_q:
            return self
        times, tiles = self.block_q // block_q, math.ceil(self.n_q / block_q)
        parts = {
            name: value.repeat_interleave(times, dim=2)[:, :, :tiles]
            for name in ("starts", "start_counts", "tokens", "token_counts", "log_weight")
            if (value := getattr(self, name)) is not None and not (self.one_list and name in ("tokens", "log_weight"))
        }
        return replace(self, block_q=block_q, **parts)

    def expand(self, batch: int, heads: int) -> Selection:
        """With explicit batch and heads: a shared list is repeated over the batch and over the heads of each group (views)."""
        if self.batch not in (1, batch) or heads % self.heads:
            raise ValueError(
                f"a selection over batch {self.batch} and {self.heads} heads does not fit batch {batch} and {heads} heads"
            )

        def grow(x: Tensor) -> Tensor:
            if x.shape[1] != heads:
                x = x.repeat_interleave(heads // x.shape[1], dim=1)
            return x.expand(batch, *x.shape[1:])

        weight = None if self.log_weight is None else grow(self.log_weight)
        return replace(
            self, starts=grow(self.starts), start_counts=grow(self.start_counts), tokens=grow(self.tokens),
            token_counts=grow(self.token_counts), log_weight=weight,
        )  # fmt: skip


def _same_leading(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return a.expand(*lead, -1), b.expand(*lead, -1)


def _combined_weight(a: Selection, b: Selection, *, union: bool) -> Tensor | None:
    """Per-key weights `(B, H, Tq, n_k)` of a union or intersection; None when neither operand has weights."""
    if a.log_weight is None and b.log_weight is None:
        return None

    def spread(s: Selection) -> tuple[Tensor, Tensor, Tensor]:
        """(weight of each key, whether it carries one, whether it is listed without one)."""
        s = s.own_lists()
        plain, singles = cover(s.starts, s.block_k, s.n_k), mark(s.tokens, s.n_k)
        if s.log_weight is None:
            return torch.zeros_like(plain, dtype=torch.float32), torch.zeros_like(plain), plain | singles
        weight = torch.zeros(*plain.shape[:-1], s.n_k + 1, device=plain.device)
        weight = weight.scatter(-1, s.tokens.long().clamp(max=s.n_k), s.log_weight)[..., : s.n_k]
        return weight, singles, plain

    (wa, weighted_a, plain_a), (wb, weighted_b, plain_b) = spread(a), spread(b)
    if bool(((wa != wb) & weighted_a & weighted_b).any()):
        raise ValueError("the same key carries two different log weights: combine the selections before weighting them")
    weight = torch.where(weighted_a, wa, wb)
    return torch.where(plain_a | plain_b, 0.0, weight) if union else weight
