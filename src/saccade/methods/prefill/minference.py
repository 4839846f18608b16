"""MInference 1.0: every head has one of three sparse shapes, fixed offline; what fills the shape is found online by a cheap probe.

    A-shape         the first `initial` and the last `local` keys, for every prompt the same
    vertical-slash  P = softmax(q_last k^T * scale) of the last 64 queries; the columns with the largest sum_i P_ij and the
                    diagonals o with the largest sum_i P_i,i-o
    block-sparse    the blocks with the largest mean(q block) . mean(k block), for each block of queries

Which shape a head gets is searched offline among candidates of equal cost, by the difference that they make to the attention output
(`saccade calibrate minference`). Without a plan all heads have the shape `pattern`. Decoding is dense.

Source: minference, arXiv 2407.02490, section 3 and algorithms 1 to 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Calibrated, Info, LayerContext, Prefill, Selection, register
from saccade.ops.estimate import TileGrid, pooled_scores, row_sums
from saccade.parts import patterns
from saccade.parts.choose import ranks
from saccade.parts.equalcost import largest_within
from saccade.parts.lists import KeyLists, best_listed, join_heads, open_rows, tile_ends
from saccade.parts.sizes import check_size, resolve

PATTERNS = ("a-shape", "vertical-slash", "block-sparse")
A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = range(3)
# (columns, offsets) that the search tries, the paper's; together with the A-shape and the blocks they are six candidates
SEARCHED = ((30, 2048), (100, 1800), (500, 1500), (3000, 200))
LEAST_COLUMNS, LEAST_OFFSETS = 30, 50
SAMPLE_TOKENS = 30_000  # length of the sample that the paper's sizes were found on
NOTICEABLE = 5e-3  # an output element that is off by more counts as wrong


@dataclass(frozen=True)
class Ranked:
    """What a prompt offers on a device: the score of every column and every offset, `(B, Hq, Nk)` each, inf where it is always taken; and
    the rank (0 is best) of every block in each row of blocks, `(B, Hq, Tq, Tk)`, past the last block where it is not visible. None
    where no head needs it."""

    device: torch.device
    vertical: Tensor | None
    slash: Tensor | None
    blocks: Tensor | None


@register
@dataclass(frozen=True, kw_only=True)
class MInference(Prefill, Calibrated):
    """The shape of every head comes from the plan, else from the fields. Sizes are tokens (int) or shares of the prompt (float in (0, 1]).

    pattern: "a-shape", "vertical-slash" or "block-sparse". columns, offsets: of a vertical-slash head, forced ones included.
    initial, local: of an A-shape head. blocks: of a block-sparse head, for each block of queries (a share: of all blocks).
    probe: last queries that choose columns and offsets. sinks, near: first columns and smallest offsets that are always among the chosen.
    dense_rows: last rows, rounded up to whole blocks, that read everything (the tri-shape variant uses 100).
    block: queries and keys per tile. growth: sizes of a plan found on n tokens are used on N tokens times `(N / n) ** growth`: 0, as
    in the paper, keeps the token counts, 1 keeps the density.
    """

    pattern: Literal["a-shape", "vertical-slash", "block-sparse"] = "vertical-slash"
    columns: int | float = 1000
    offsets: int | float = 6096
    initial: int | float = 1024
    local: int | float = 4096
    blocks: int | float = 100
    probe: int = 64
    sinks: int = 30
    near: int = 100
    dense_rows: int = 0
    block: int = 64
    growth: float = 0.0

    info = Info(
        slug="minference", phase="prefill", opened={"offsets": 1.0},
        tiny={"columns": 8, "offsets": 12, "probe": 8, "sinks": 2, "near": 4, "block": 16},
        opts_out={
            "chunked": "the probe is the last rows of what is given, so every chunk of a prompt chooses anew",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "columns and diagonals are chosen by the last rows of the prompt for all rows; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"minference(pattern={self.pattern!r}) is not a shape: use one of {', '.join(PATTERNS)}")
        for name in ("columns", "offsets", "initial", "local", "blocks"):
            check_size("minference", name, getattr(self, name))
        for name, least in (("probe", 1), ("sinks", 0), ("near", 0), ("dense_rows", 0), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"minference({name}={value!r}) is not a whole number of at least {least}")
        if isinstance(self.growth, bool) or not isinstance(self.growth, int | float) or not 0 <= self.growth <= 1:
            raise ValueError(f"minference(growth={self.growth!r}) is not between 0 (sizes stay) and 1 (density stays)")

    # -- online ------------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k = q.shape[2], k.shape[2]
        shapes, sizes = self._shapes(ctx, q.shape[1], n_k)
        lists = self._lists(self._rank(ctx, q, k, shapes), shapes, sizes.unsqueeze(0), n_q, n_k)
        if self.dense_rows:
            lists = open_rows(lists, n_q=n_q, n_k=n_k, last=self.dense_rows, block=self.block)
        return lists.selection(n_q=n_q, n_k=n_k, block=self.block)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self._covers(*self._shapes(ctx, q.shape[1], k.shape[2]), k.shape[2]):
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))

    def _shapes(self, ctx: LayerContext, heads: int, n_k: int) -> tuple[Tensor, Tensor]:
        """Shape of each head, int64 `(Hq,)`, and its two sizes in tokens (blocks, 0 for block-sparse), int64 `(Hq, 2)`."""
        if ctx.plan is None:
            index = PATTERNS.index(self.pattern)
            return torch.full((heads,), index), torch.tensor(self._own_sizes(n_k)[index]).expand(heads, 2)
        shapes, sizes = ctx.found("pattern").cpu(), ctx.found("sizes").cpu()
        if shapes.shape != (heads,) or sizes.shape != (heads, 2):
            raise ValueError(f"this minference plan is for {shapes.shape[0]} heads, layer {ctx.layer} has {heads}: calibrate this model")
        stretch = (n_k / float(ctx.found("length").sum())) ** self.growth
        grown = (sizes.double() * stretch).round().long()
        # a size that was not 0 stays at least 1
        return shapes, torch.where(sizes > 0, grown.clamp(min=1), 0)

    def _own_sizes(self, n_k: int) -> list[tuple[int, int]]:
        tokens = {name: resolve(getattr(self, name), n_k) for name in ("initial", "local", "columns", "offsets")}
        n_blocks = math.ceil(n_k / self.block)
        return [(tokens["initial"], tokens["local"]), (tokens["columns"], tokens["offsets"]), (resolve(self.blocks, n_blocks), 0)]

    def _covers(self, shapes: Tensor, sizes: Tensor, n_k: int) -> bool:
        """Whether every head reads everything whatever the prompt says."""
        together, largest = sizes.sum(-1), sizes.amax(-1)
        reach = torch.where(shapes == A_SHAPE, together, torch.where(shapes == BLOCK_SPARSE, largest * self.block, largest))
        return bool((reach >= n_k).all())

    def _rank(self, ctx: LayerContext, q: Tensor, k: Tensor, shapes: Tensor) -> Ranked:
        vertical = slash = by_block = None
        if bool((shapes == VERTICAL_SLASH).any()):
            sums = row_sums(q[:, :, -self.probe :], k, diagonals=True, scale=ctx.scale, softcap=ctx.softcap)
            vertical, slash = sums.columns, sums.diagonals
            assert slash is not None
            vertical[..., : self.sinks] = torch.inf
            slash[..., : self.near] = torch.inf
        if bool((shapes == BLOCK_SPARSE).any()):
            by_block = self._rank_blocks(q, k)
        return Ranked(q.device, vertical, slash, by_block)

    def _rank_blocks(self, q: Tensor, k: Tensor) -> Tensor:
        grid = TileGrid.of(q, k, self.block, self.block)
        scores = pooled_scores(q, k, self.block, self.block)
        if grid.offset % self.block:
            # a chunk that begins inside a block: the block of its tiles' first rows must be there, or those rows may see nothing
            first = (tile_ends(grid.n_q, grid.n_k, self.block, q.device) - self.block).unsqueeze(-1)
            begin = torch.arange(grid.columns, device=q.device) * self.block
            scores = scores.masked_fill((begin <= first) & (first < begin + self.block), torch.inf)
        return ranks(scores).masked_fill(~grid.visible(q.device), grid.columns)

    def _lists(self, ranked: Ranked, shapes: Tensor, sizes: Tensor, n_q: int, n_k: int) -> KeyLists:
        """Lists of all heads; their shapes `(Hq,)` are on the CPU, and so are their sizes `(B or 1, Hq, 2)` where nothing changes them."""
        device = ranked.device
        ends = tile_ends(n_q, n_k, self.block, device)
        parts = []
        for shape in shapes.unique().tolist():
            which = (shapes == shape).nonzero().squeeze(-1)
            first, second = sizes[:, which.to(sizes.device)].unbind(-1)
            heads = which.to(device)
            if shape == A_SHAPE:
                lists = patterns.a_shape(first.to(device), second.to(device), ends, self.block, n_k)
            elif shape == VERTICAL_SLASH:
                assert ranked.vertical is not None and ranked.slash is not None
                columns, offsets = best_listed(ranked.vertical[:, heads], first), best_listed(ranked.slash[:, heads], second)
                lists = patterns.listed_slash(columns, offsets, ends, self.block, n_k)
            else:
                assert ranked.blocks is not None
                # an invisible block ranks behind all, so no size reaches it
                chosen = ranked.blocks[:, heads] < first.clamp(max=ranked.blocks.shape[-1]).to(device)[..., None, None]
                lists = patterns.blocks(chosen, self.block, n_k)
            parts.append((heads, lists))
        return join_heads(parts, n_k)

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """For each candidate: how many output elements it gets wrong, and its sizes once it costs what the A-shape costs.

        "errors" `(Hq, C)`, "sizes" `(Hq, C, 2)`, "length" and "samples" `(1,)`, all float64 and summed over the batch. The cost is
        `Selection.pairs()`: key tiles are counted whole. Sizes given as tokens are meant for samples of 30 000 tokens: they shrink
        in proportion on shorter ones, where they would cover everything.
        """
        batch, heads, n = *q.shape[:2], q.shape[2]
        ranked = self._rank(ctx, q, k, torch.tensor([VERTICAL_SLASH, BLOCK_SPARSE]))
        dense = ctx.attend(q, k, v, None)
        errors, found = [], []
        target: Tensor | None = None
        for shape, base in self._candidates(n):
            shapes = torch.full((heads,), shape)

            def selection(sizes: Tensor, shapes: Tensor = shapes) -> Selection:
                return self._lists(ranked, shapes, sizes, n, n).selection(n_q=n, n_k=n, block=self.block)

            sizes = torch.tensor(base, device=q.device).round().long().clamp(min=1, max=n).expand(batch, heads, 2)
            if target is None:
                target = selection(sizes).pairs()
            else:
                least = torch.tensor((LEAST_COLUMNS, LEAST_OFFSETS) if shape == VERTICAL_SLASH else (1, 0), device=q.device)
                sizes = largest_within(
                    target, lambda s: selection(s).pairs(), torch.tensor(base, device=q.device), least=least, most=n
                )
            out = ctx.attend(q, k, v, selection(sizes))
            errors.append(((out - dense).abs() > NOTICEABLE).sum((0, 2, 3)))
            found.append(sizes.sum(0))
        return {
            "errors": torch.stack(errors, dim=1).double(), "sizes": torch.stack(found, dim=1).double(),
            "length": torch.tensor([float(n * batch)], dtype=torch.float64),
            "samples": torch.tensor([float(batch)], dtype=torch.float64),
        }  # fmt: skip

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The candidate with the fewest wrong elements, and its mean sizes: "pattern" `(Hq,)`, "sizes" `(Hq, 2)`, "length" `(1,)`, int64.

        Sizes are tokens (blocks for block-sparse), as in the paper, found on samples of "length" tokens.
        """
        best = torch.sort(sums["errors"].cpu(), dim=-1, stable=True).indices[:, 0]
        mean = sums["sizes"].cpu() / sums["samples"].cpu()
        length = (sums["length"] / sums["samples"]).round().long()
        shapes = torch.tensor([shape for shape, _ in self._candidates(int(length))])
        return {"pattern": shapes[best], "sizes": mean[torch.arange(len(best)), best].round().long(), "length": length}

    def _candidates(self, n: int) -> list[tuple[int, tuple[float, float]]]:
        """(shape, sizes before they are tuned) on a sample of n tokens; the first one sets the cost."""
        shrink = min(1.0, n / SAMPLE_TOKENS)

        def tokens(size: int | float) -> float:
            return size * n if isinstance(size, float) else size * shrink

        slashes = [(VERTICAL_SLASH, (c * shrink, o * shrink)) for c, o in SEARCHED]
        n_blocks = self.blocks * n / self.block if isinstance(self.blocks, float) else self.blocks * shrink
        return [(A_SHAPE, (tokens(self.initial), tokens(self.local))), *slashes, (BLOCK_SPARSE, (n_blocks, 0.0))]
