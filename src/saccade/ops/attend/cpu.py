"""Gathering implementation: the listed keys of each query tile are gathered and nothing else is touched.

A (batch, head, query tile) triple is an independent small problem. Triples with about equally many keys are run together as one
batched call, so that ragged selections waste little and few calls are made. Work and memory traffic follow the selection's density;
temporaries are bounded by CHUNK. Plain torch, made for CPUs, runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.core import Partial, Selection, merge
from saccade.core.tilemath import fill_past
from saccade.ops.attend.features import Bounds, by_query_head, counted_only, row_bounds
from saccade.ops.attend.gather import KeyRows
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.tile import attend_tile, cpu_flash

CHUNK = 1 << 24  # elements of gathered keys, or of one mask, held at a time
SLACK = 1.15  # how much longer than the shortest the longest list of a batched call may be
FEW = 32  # single tokens that a list of a batched call may have more than another in any case


def attend(problem: Problem) -> Partial:
    """Attention over `problem.selection`; sinks are the caller's."""
    if problem.ragged:
        problem = replace(problem, k=counted_only(problem, problem.k), v=counted_only(problem, problem.v))
    work = _Work.of(problem)
    lists = work.lists
    tiles, tokens = (x.flatten().cpu() for x in (lists.start_counts, lists.token_counts))
    for triples in _batches(tiles * lists.block_k, tokens, max(problem.k.shape[-1], work.rows_per_tile)):
        if work.plain:
            work.run_plain(triples.to(problem.q.device))
        else:
            alike = all(bool((count[triples] == count[triples[0]]).all()) for count in (tiles, tokens))
            work.run(triples.to(problem.q.device), exact=alike)
    return work.result()


def _batches(tiles: Tensor, tokens: Tensor, width: int) -> Iterator[Tensor]:
    """Triples with about equally many keys in tiles, and as single tokens, together; empty lists are left out.

    Cut where either number differs too much or a batch would grow too large.
    """
    order = torch.argsort(tiles * (int(tokens.max()) + 1) + tokens, stable=True)
    a, b = tiles[order].tolist(), tokens[order].tolist()
    begin = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x or y), len(a))
    while begin < len(a):
        end, fewest, most = begin, b[begin], b[begin]
        while end < len(a):
            low, high = min(fewest, b[end]), max(most, b[end])
            alike = a[end] <= SLACK * a[begin] and high <= max(SLACK * low, low + FEW)
            if not alike or (end - begin + 1) * (a[end] + high) * width > CHUNK:
                break
            end, fewest, most = end + 1, low, high
        end = max(end, begin + 1)
        yield order[begin:end]
        begin = end


@dataclass
class _Work:
    """q as tiles `(triples, rows, D)`, the lists `(B, H, Tq, ...)` they read, and the results so far."""

    problem: Problem
    lists: Selection
    group: int
    q: Tensor
    keys: KeyRows
    out: Tensor
    lse: Tensor | None
    bounds: Bounds | None

    @classmethod
    def of(cls, problem: Problem) -> _Work:
        s, q, layout = problem.selection, problem.q, problem.layout
        assert s is not None
        # lists shared by a group: its queries become rows of one tile, so keys are gathered once per key/value head
        shared = layout.kv_heads % s.heads == 0
        group = layout.group if shared else 1
        lists = s.expand(q.shape[0], layout.kv_heads if shared else layout.query_heads)
        padded = torch.nn.functional.pad(q, (0, 0, 0, s.tiles * s.block_q - s.n_q))
        tiles = padded.unflatten(1, (lists.heads, group)).unflatten(3, (s.tiles, s.block_q))
        tiles = tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B*H*Tq, group*block_q, D)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full(tiles.shape[:2], -torch.inf, dtype=exact, device=q.device) if problem.return_lse else None
        return cls(
            problem=problem, lists=lists, group=group, q=tiles, out=q.new_zeros(*tiles.shape[:2], problem.v.shape[-1]), lse=lse,
            keys=KeyRows(problem.k, problem.v, heads=lists.heads, group=1 if shared else layout.group, reuse=not problem.wants_grad),
            bounds=row_bounds(problem),
        )  # fmt: skip

    @property
    def rows_per_tile(self) -> int:
        return self.q.shape[1]

    @property
    def plain(self) -> bool:
        """Nothing is added to the logits and no gradient is wanted: what every row of a tile sees needs no mask."""
        p = self.problem
        added = p.bias is not None or p.low_rank is not None or self.lists.log_weight is not None or p.softcap is not None
        # parts are merged: in half precision that would round twice
        exact = self.q.dtype in (torch.float32, torch.float64)
        return exact and self.q.device.type == "cpu" and not (added or p.ragged or p.wants_grad)

    def run_plain(self, triples: Tensor) -> None:
        """Attention of these query tiles in two parts: tiles that all their rows see, and keys at the edge, under a small mask."""
        s = self.lists
        pairs = torch.div(triples, s.tiles, rounding_mode="floor")
        first = (triples % s.tiles) * s.block_q + s.offset
        n_tiles, n_tokens = _longest(s, triples)
        starts, tokens = _listed(s.starts, s, triples, n_tiles).long(), _single_keys(s, triples, n_tokens).long()
        # last tiles, which rows see in part, stand in the same columns
        starts = _ends_aligned(starts, s.start_counts.flatten()[triples], s.n_k)
        within = torch.arange(s.block_k, device=s.device)
        if self.problem.q_positions is None:
            limit = first.clamp(max=s.n_k - 1).unsqueeze(-1) if s.causal else s.n_k - 1
            whole, single = ((x <= limit).all(0) for x in (starts + (s.block_k - 1), tokens))
            own = self.own_tiles(starts, first)
        else:
            seen = self.seen_by_all(triples, torch.cat([(starts.unsqueeze(-1) + within).flatten(1), tokens], dim=1)).all(0)
            whole, single = seen[: starts.shape[1] * s.block_k].view(-1, s.block_k).all(1), seen[starts.shape[1] * s.block_k :]
            own = 0
        if own:
            whole, starts, diagonal = whole[:-own], starts[:, :-own], starts[:, -own:]
        edge, inner = (x.unsqueeze(-1).add(within).flatten(1) for x in (starts[:, ~whole], starts[:, whole]))
        ids = torch.cat([edge, tokens[:, ~single]], dim=1)
        q, parts = self.q[triples].unsqueeze(1), []
        lse = self.lse is not None or bool(ids.shape[1]) or bool(own) + bool(whole.any()) + bool(single.any()) > 1
        if s.block_k > 1 and not bool((inner[:, :: s.block_k] % s.block_k).any()):
            groups = [(True, starts[:, whole]), (False, tokens[:, single])]
        else:
            groups = [(False, torch.cat([inner, tokens[:, single]], dim=1))]
        for tiles, listed in groups:
            if listed.shape[1]:
                k, v = self.keys.gather_tiles(listed, pairs, s.block_k) if tiles else self.keys.gather(listed, pairs)
                parts.append(self._part(q, k, v, None, return_lse=lse))
        if own:
            k, v = self.keys.gather((diagonal.unsqueeze(-1) + within).flatten(1), pairs)
            parts.append(self.on_diagonal(q, k, v))
        if ids.shape[1]:
            if self.problem.q_positions is not None:
                visible = self.seen(triples, ids)
                mask = torch.zeros(visible.shape, dtype=q.dtype, device=ids.device).masked_fill_(~visible, -torch.inf)
            else:
                mask = _mask(ids, first, s, q.dtype, False)
                if mask is not None and mask.shape[1] > 1 and self.group > 1:
                    mask = mask.repeat(1, self.group, 1)
            k, v = self.keys.gather(ids, pairs)
            parts.append(self._part(q, k, v, mask, return_lse=True))
        part = parts[0] if len(parts) == 1 else merge(*parts)
        self.out[triples] = part.out.squeeze(1)
        if self.lse is not None and part.lse is not None:
            self.lse[triples] = part.lse.squeeze(1)

    def own_tiles(self, starts: Tensor, first: Tensor) -> int:
        """How many of the last tiles are the rows' own keys, exactly, in every list; 0 where they are not."""
        s = self.lists
        count = s.block_q // s.block_k
        if not s.causal or s.block_q % s.block_k or not 0 < count <= starts.shape[1] or self.q.shape[-1] != self.problem.v.shape[-1]:
            return 0
        wanted = first.unsqueeze(-1) + torch.arange(0, s.block_q, s.block_k, device=s.device)
        return count if bool((starts[:, -count:] == wanted).all()) else 0

    def on_diagonal(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """Causal attention of rows `(P, 1, group * block_q, D)` over their own keys `(P, block_q, D)`."""
        heads = q.unflatten(2, (self.group, -1)).squeeze(1)
        k, v = (x.unsqueeze(1).expand(-1, self.group, -1, -1) for x in (k, v))
        out, lse = cpu_flash(heads, k, v, self.problem.scale, causal=True)
        return Partial(out.flatten(1, 2).unsqueeze(1), lse.flatten(1, 2).unsqueeze(1))

    def _part(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, return_lse: bool) -> Partial:
        return attend_tile(
            q, k.unsqueeze(1), v.unsqueeze(1), None if mask is None else mask.unsqueeze(1), scale=self.problem.scale, softcap=None,
            bias=None, return_lse=return_lse,
        )  # fmt: skip

    def run(self, triples: Tensor, *, exact: bool) -> None:
        """Attention of these query tiles; exact: their lists are equally long."""
        s, problem = self.lists, self.problem
        pairs = torch.div(triples, s.tiles, rounding_mode="floor")  # (batch, head)
        ids, n_tokens = _key_ids(s, triples)
        first = (triples % s.tiles) * s.block_q + s.offset
        seen = self.seen(triples, ids) if problem.masked else None
        if seen is None:
            mask = _mask(ids, first, s, problem.q.dtype, exact)
            if mask is not None and mask.shape[1] > 1 and self.group > 1:
                mask = mask.repeat(1, self.group, 1)
        else:
            mask = torch.zeros(seen.shape, dtype=problem.q.dtype, device=seen.device).masked_fill(~seen, -torch.inf)
        k, v = self.keys.gather(ids, pairs)
        bias = self.bias(triples, ids, n_tokens)
        empty = self.empty_rows(ids, first) if seen is None else ~seen.any(-1, keepdim=True)
        # a fused kernel leaves rows without a visible key undefined, their gradients too
        exactly = problem.return_lse or (empty is not None and problem.wants_grad)
        part = attend_tile(
            self.q[triples].unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), None if mask is None else mask.unsqueeze(1),
            scale=problem.scale, softcap=problem.softcap, bias=None if bias is None else bias.unsqueeze(1),
            return_lse=exactly,
        )  # fmt: skip
        out = part.out.squeeze(1)
        if empty is not None:
            out = out.masked_fill(empty, 0.0)
        self.out[triples] = out
        if self.lse is not None and part.lse is not None:
            self.lse[triples] = part.lse.squeeze(1)

    def empty_rows(self, ids: Tensor, first: Tensor) -> Tensor | None:
        """Rows that see none of the gathered keys, bool `(P, rows, 1)`; None where there are none."""
        s = self.lists
        smallest = ids.amin(-1, keepdim=True)
        if not bool((smallest > first[:, None]).any() if s.causal else (smallest >= s.n_k).any()):
            return None
        rows = first[:, None] + torch.arange(s.block_q, device=ids.device).repeat(self.group)
        return (smallest > rows if s.causal else smallest >= s.n_k).unsqueeze(-1)

    def seen_by_all(self, triples: Tensor, ids: Tensor) -> Tensor:
        """Which of the gathered keys `(P, n)` every row of their tile sees by positions: bool `(P, n)`."""
        s, problem = self.lists, self.problem
        assert problem.q_positions is not None and problem.k_positions is not None
        rows, keys = (by_query_head(x, s.heads * self.group).unsqueeze(-1) for x in (problem.q_positions, problem.k_positions))
        padded = (triples % s.tiles * s.block_q).unsqueeze(-1) + torch.arange(s.block_q, device=ids.device) >= s.n_q
        lowest = self.of_tiles(rows, triples).masked_fill(padded[:, None, :, None], torch.iinfo(rows.dtype).max).amin((2, 3))
        return (self.of_keys(keys, triples, ids).squeeze(-1) <= lowest.unsqueeze(-1)).all(1) & (ids < s.n_k)

    def seen(self, triples: Tensor, ids: Tensor) -> Tensor:
        """Which of the gathered keys `(P, n)` each row sees by bounds and positions: bool `(P, rows, n)`."""
        s, problem = self.lists, self.problem
        seen = (ids < s.n_k)[:, None, None]  # (P, group or 1, block_q or 1, n)
        if self.bounds is not None:
            lo, hi = (self.of_tiles(x[:, None, :, None].expand(-1, s.heads * self.group, -1, -1), triples) for x in self.bounds)
            seen = seen & (ids[:, None, None] >= lo) & (ids[:, None, None] < hi)
        if problem.q_positions is not None and problem.k_positions is not None:
            rows, keys = (by_query_head(x, s.heads * self.group).unsqueeze(-1) for x in (problem.q_positions, problem.k_positions))
            seen = seen & (self.of_keys(keys, triples, ids).mT <= self.of_tiles(rows, triples))
        return seen.expand(-1, self.group, s.block_q, -1).flatten(1, 2)

    def of_tiles(self, x: Tensor, triples: Tensor) -> Tensor:
        """x `(B or 1, Hq, Nq, C)` for the rows of these query tiles: `(P, group, block_q, C)`, 0 past the last row."""
        s = self.lists
        pairs, tile = torch.div(triples, s.tiles, rounding_mode="floor"), triples % s.tiles
        x = x.unflatten(1, (s.heads, self.group)).expand(s.batch, -1, -1, -1, -1)
        rows = tile[:, None] * s.block_q + torch.arange(s.block_q, device=x.device)
        batch, head = torch.div(pairs, s.heads, rounding_mode="floor"), pairs % s.heads
        picked = x[batch[:, None], head[:, None], :, rows.clamp(max=s.n_q - 1)].transpose(1, 2)
        return picked.masked_fill((rows >= s.n_q)[:, None, :, None], 0)

    def of_keys(self, x: Tensor, triples: Tensor, ids: Tensor) -> Tensor:
        """x `(B or 1, Hq, Nk, C)` for the gathered keys `(P, n)`: `(P, group, n, C)`."""
        s = self.lists
        pairs = torch.div(triples, s.tiles, rounding_mode="floor")
        x = x.unflatten(1, (s.heads, self.group)).expand(s.batch, -1, -1, -1, -1)
        batch, head = torch.div(pairs, s.heads, rounding_mode="floor"), pairs % s.heads
        return x[batch[:, None], head[:, None], :, ids.clamp(max=s.n_k - 1)].transpose(1, 2)

    def bias(self, triples: Tensor, ids: Tensor, n_tokens: int) -> Tensor | None:
        """All additive terms `(P, rows or 1, n)` for the gathered keys."""
        total = _bias(self.problem, self.lists, triples, ids, n_tokens, self.group)
        if self.problem.low_rank is None:
            return total
        exact = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        a, b = (x.to(exact).expand(-1, self.lists.heads * self.group, -1, -1) for x in self.problem.low_rank)
        product = (self.of_tiles(a, triples) @ self.of_keys(b, triples, ids).mT).flatten(1, 2)
        return product if total is None else product + total.to(exact)

    def result(self) -> Partial:
        s = self.lists

        def untile(x: Tensor) -> Tensor:
            x = x.unflatten(0, (s.batch, s.heads, s.tiles)).unflatten(3, (self.group, s.block_q))
            return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, : s.n_q]

        return Partial(untile(self.out), None if self.lse is None else untile(self.lse))


def _key_ids(s: Selection, triples: Tensor) -> tuple[Tensor, int]:
    """Key ids `(P, n)` int64 of each triple, single tokens last (ids >= n_k are padding), and how many columns are tokens."""
    n_tiles, n_tokens = _longest(s, triples)
    starts = _listed(s.starts, s, triples, n_tiles).long()
    ids = (starts.unsqueeze(-1) + torch.arange(s.block_k, device=s.device)).flatten(1)
    if n_tokens:
        ids = torch.cat([ids, _single_keys(s, triples, n_tokens).long()], dim=1)
    return ids, n_tokens


def _longest(s: Selection, triples: Tensor) -> tuple[int, int]:
    """The most tiles, and the most single tokens, that one of the triples reads."""
    tiles, tokens = (int(counts.flatten()[triples].max()) for counts in (s.start_counts, s.token_counts))
    return tiles, tokens


def _listed(x: Tensor, s: Selection, triples: Tensor, width: int) -> Tensor:
    """The first `width` entries of `x (B, H, Tq or 1, M)` for each triple: `(P, width)`."""
    rows = triples if x.shape[2] == s.tiles else torch.div(triples, s.tiles, rounding_mode="floor")
    return x.flatten(0, 2)[rows, :width]


def _single_keys(s: Selection, triples: Tensor, width: int) -> Tensor:
    """The single tokens of each triple, past its count n_k: `(P, width)`. Only here are lists that tiles share written out."""
    tokens = _listed(s.tokens, s, triples, width)
    return fill_past(tokens, s.token_counts.flatten()[triples], s.n_k) if s.one_list else tokens


def _ends_aligned(starts: Tensor, counts: Tensor, n_k: int) -> Tensor:
    """`starts (P, M)` with what fills up shorter lists, `counts (P,)` long, moved to their beginning."""
    gaps = starts.shape[1] - counts.long()
    if not bool(gaps.any()):
        return starts
    places = torch.arange(starts.shape[1], device=starts.device) - gaps.unsqueeze(-1)
    return starts.gather(1, places.clamp(min=0)).masked_fill_(places < 0, n_k)


def _mask(ids: Tensor, first: Tensor, s: Selection, dtype: torch.dtype, exact: bool) -> Tensor | None:
    """Additive mask `(P or 1, rows or 1, n)`, 0 or -inf; None when every row sees every key.

    Only columns that some row can't see are filled in; where all triples look alike (whole tiles and the diagonal one last), one
    mask serves them all.
    """
    limit = first.unsqueeze(-1) if s.causal else s.n_k - 1
    columns = ((ids > limit) | (ids >= s.n_k)).any(0).nonzero().squeeze(-1)
    if not len(columns):
        return None
    edge = ids[:, columns]
    rows = torch.arange(s.block_q, device=ids.device)
    if not s.causal:
        visible = (edge < s.n_k).unsqueeze(1)
    else:
        relative = edge - first.unsqueeze(-1)
        if exact and bool((relative == relative[:1]).all()) and bool((edge < s.n_k).all()):
            relative = relative[:1]
            visible = relative.unsqueeze(1) <= rows.unsqueeze(-1)
        else:
            visible = (relative.unsqueeze(1) <= rows.unsqueeze(-1)) & (edge < s.n_k).unsqueeze(1)
    mask = torch.zeros(*visible.shape[:2], ids.shape[-1], dtype=dtype, device=ids.device)
    mask[..., columns] = torch.zeros((), dtype=dtype, device=ids.device).masked_fill(~visible, -torch.inf)
    return mask


def _bias(problem: Problem, s: Selection, triples: Tensor, ids: Tensor, n_tokens: int, group: int) -> Tensor | None:
    """Additive terms `(P, rows or 1, n)` for the gathered keys: the bias argument and the selection's log weights."""
    total: Tensor | None = None
    if s.log_weight is not None:
        weight = _listed(s.log_weight, s, triples, n_tokens)
        # padding carries any weight: it is masked
        total = torch.nn.functional.pad(weight, (ids.shape[-1] - n_tokens, 0)).unsqueeze(1)
    if problem.bias is None:
        return total
    batch, heads = problem.q.shape[:2]
    pairs, tile = torch.div(triples, s.tiles, rounding_mode="floor"), triples % s.tiles
    bias = problem.bias.expand(batch, heads, -1, -1).unflatten(1, (s.heads, group)).flatten(0, 1)
    if bias.shape[-2] > 1:
        bias = torch.nn.functional.pad(bias, (0, 0, 0, s.tiles * s.block_q - s.n_q)).unflatten(2, (s.tiles, s.block_q))
        bias = bias.transpose(1, 2)[pairs, tile]  # (P, group, rows, keys)
    else:
        bias = bias[pairs].expand(-1, -1, s.block_q, -1)
    if bias.shape[-1] > 1:
        bias = torch.gather(bias, -1, ids.clamp(max=s.n_k - 1)[:, None, None].expand(*bias.shape[:3], -1))
    bias = bias.flatten(1, 2)
    return bias if total is None else bias + total
