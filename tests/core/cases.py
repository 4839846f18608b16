"""Random selections beside what they mean, written out as a dense mask with loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.core import Selection

few = settings(max_examples=50, deadline=None)


@dataclass(frozen=True)
class Case:
    """A selection, the dense mask `(B, H, n_q, n_k)` it must mean, and per-pair log weights of the same shape (0 where none)."""

    selection: Selection
    mask: Tensor
    weight: Tensor


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int | bool]:
    """Queries, keys and whether causal: what two selections must share to be combined."""
    return {"n_q": draw(st.integers(1, 13)), "n_k": draw(st.integers(1, 17)), "causal": draw(st.booleans())}


@st.composite
def cases(
    draw: st.DrawFn, shape: dict[str, int | bool] | None = None, batch: int | None = None, heads: int | None = None, weighted: bool = False
) -> Case:
    shape = draw(sizes()) if shape is None else shape
    return make_case(
        **shape, block_q=draw(st.integers(1, 6)), block_k=draw(st.integers(1, 6)),
        batch=draw(st.integers(1, 2)) if batch is None else batch, heads=draw(st.sampled_from([1, 2, 4])) if heads is None else heads,
        aligned=draw(st.booleans()), with_tiles=draw(st.booleans()), with_tokens=draw(st.booleans()), weighted=weighted,
        seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip


def make_case(
    *, n_q: int, n_k: int, causal: bool, block_q: int, block_k: int, batch: int, heads: int, aligned: bool, with_tiles: bool,
    with_tokens: bool, weighted: bool, seed: int,
) -> Case:  # fmt: skip
    """Lists in any order, with repeats and entries outside the keys, ragged by counts; tiles never overlap."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    tiles = math.ceil(n_q / block_q)
    with_tokens = with_tokens or weighted or not with_tiles
    lead, width = (batch, heads, tiles), 4
    starts = torch.full((*lead, width), 99)
    tokens = torch.randint(-2, n_k + 3, (*lead, 5), generator=generator)
    start_counts = torch.randint(0, width + 1, lead, generator=generator)
    token_counts = torch.randint(0, 6, lead, generator=generator)
    by_token = torch.randn(n_k + 5, generator=generator)
    listed = torch.zeros(*lead, n_k, dtype=torch.bool)
    weight = torch.zeros(*lead, n_k)
    for index in [(b, h, t) for b in range(batch) for h in range(heads) for t in range(tiles)]:
        if with_tiles:
            grid = list(range(0, n_k, block_k))
            order = torch.randperm(len(grid), generator=generator)[:width].tolist()
            shift = 0 if aligned else number(0, block_k - 1)
            own = [grid[i] + shift for i in order]
            starts[index][: len(own)] = torch.tensor(own)
            for start in own[: int(start_counts[index])]:
                listed[index][start : start + block_k] = start < n_k
        inside = listed[index].clone()
        if with_tokens:
            for token in tokens[index][: int(token_counts[index])].tolist():
                if 0 <= token < n_k:
                    listed[index][token] = True
                    weight[index][token] = 0.0 if inside[token] else by_token[token]
    selection = Selection.from_parts(
        n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, causal=causal, starts=starts if with_tiles else None,
        start_counts=start_counts if with_tiles else None, tokens=tokens if with_tokens else None,
        token_counts=token_counts if with_tokens else None, log_weight=by_token[tokens] if weighted else None,
    )  # fmt: skip
    mask = by_rows(listed, block_q, n_q) & visible(n_q, n_k, causal)
    return Case(selection, mask, by_rows(weight, block_q, n_q) if weighted else torch.zeros(mask.shape))


@dataclass(frozen=True)
class OneList:
    """A selection whose query tiles read the front parts of one token list, and the same with every tile's list written out."""

    shared: Selection
    written: Selection


@st.composite
def one_lists(draw: st.DrawFn, shape: dict[str, int | bool] | None = None, weighted: bool | None = None) -> OneList:
    shape = draw(sizes()) if shape is None else shape
    return make_one_list(
        **shape, block_q=draw(st.integers(1, 6)), block_k=draw(st.integers(1, 6)), batch=draw(st.integers(1, 2)),
        heads=draw(st.sampled_from([1, 2, 4])), weighted=draw(st.booleans()) if weighted is None else weighted,
        seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip


def make_one_list(
    *, n_q: int, n_k: int, causal: bool, block_q: int, block_k: int, batch: int, heads: int, weighted: bool, seed: int
) -> OneList:
    """Single keys before some place, tiles from there on; counts in no order, none of them reaching the list's end in some cases."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    tiles, split = math.ceil(n_q / block_q), int(torch.randint(0, n_k + 1, (1,), generator=generator))
    lead = (batch, heads)
    rows = [[[key for key in range(split) if float(random(1)) < 0.6] for _ in range(heads)] for _ in range(batch)]
    lengths = torch.tensor([[len(row) for row in rows_of] for rows_of in rows])
    counts = (random(*lead, tiles) * (lengths + 1).unsqueeze(-1)).int()
    by_key = torch.randn(*lead, n_k, generator=generator)
    tokens = torch.full((*lead, 1, int(lengths.max())), n_k, dtype=torch.int32)
    weight = random(*tokens.shape)  # what stands past the longest count is nobody's
    spread = torch.full((*lead, tiles, tokens.shape[-1]), n_k)
    starts = torch.full((*lead, tiles, max(1, math.ceil((n_k - split) / block_k))), n_k)
    for b, h in [(b, h) for b in range(batch) for h in range(heads)]:
        longest = int(counts[b, h].max())
        tokens[b, h, 0, :longest] = torch.tensor(rows[b][h][:longest], dtype=torch.int32)
        weight[b, h, 0, :longest] = by_key[b, h, rows[b][h][:longest]]
        for t in range(tiles):
            spread[b, h, t, : int(counts[b, h, t])] = torch.tensor(rows[b][h][: int(counts[b, h, t])], dtype=torch.int64)
            own = [start for start in range(split, n_k, block_k) if float(random(1)) < 0.5]
            starts[b, h, t, : len(own)] = torch.tensor(own, dtype=torch.int64)
    written = Selection.from_parts(
        n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, causal=causal, starts=starts, tokens=spread,
        log_weight=by_key.unsqueeze(2).expand(-1, -1, tiles, -1).gather(-1, spread.clamp(max=n_k - 1)) if weighted else None,
    )  # fmt: skip
    shared = replace(written, tokens=tokens, token_counts=counts, log_weight=weight if weighted else None)
    return OneList(shared, written)


def by_rows(x: Tensor, block_q: int, n_q: int) -> Tensor:
    """`(B, H, tiles, n)` to `(B, H, n_q, n)`."""
    return torch.stack([x[:, :, row // block_q] for row in range(n_q)], 2)


def visible(n_q: int, n_k: int, causal: bool) -> Tensor:
    """`(n_q, n_k)` bool."""
    return torch.tensor([[not causal or key <= n_k - n_q + row for key in range(n_k)] for row in range(n_q)])


def weight_of(selection: Selection) -> Tensor:
    """Per-pair log weights `(B, H, n_q, n_k)` of a selection's single keys."""
    spread = torch.zeros(selection.batch, selection.heads, selection.tiles, selection.n_k + 1)
    if selection.log_weight is not None:
        s = selection.own_lists().expand(selection.batch, selection.heads)
        assert s.log_weight is not None
        spread = spread.scatter(-1, s.tokens.long(), s.log_weight)
    return by_rows(spread[..., :-1], selection.block_q, selection.n_q)
