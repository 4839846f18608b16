"""What ran in an attached model, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.core.tilemath import fill_past

WAITING = 256  # single queries whose lists are counted together
LOOKED_INTO = 1 << 24  # keys that are looked up among rows at a time


class Lengths(NamedTuple):
    """How long the lists of a single query are: tiles of `block_k` keys, and single keys, for each row of the batch and head."""

    tiles: Tensor
    block_k: int
    tokens: Tensor

    @classmethod
    def of(cls, selection: Selection) -> Lengths:
        return cls(selection.start_counts, selection.block_k, selection.token_counts)

    def mean(self) -> Tensor:
        """Keys in the lists, the mean over batch and heads: float64, on their device."""
        return self.tiles.double().mean() * self.block_k + self.tokens.double().mean()


def _waits(selection: Selection) -> bool:
    """Whether asking for a value of it would hold the device up."""
    return selection.device.type == "cuda"


@dataclass
class PairCount:
    """Score pairs computed and pairs dense attention would have computed, per head on average.

    A step on a GPU is not held up for its count: what a single query read is looked up when somebody asks, or after many steps. Until
    then the lengths of its lists are kept, and not the lists, which are as long as what was read.
    """

    known: float = 0.0
    visible: float = 0.0
    waiting: list[tuple[float, int, Lengths]] = field(default_factory=list, repr=False)  # share of the heads, keys there are, lengths

    def add(self, computed: float, visible: float) -> None:
        self.known += computed
        self.visible += visible

    def add_call(self, share: float, n_q: int, n_k: int, selection: Selection | None, options: Mapping[str, Any]) -> None:
        """Count one attention call (see `computed_pairs`), of this share of the batch and heads."""
        if selection is None or n_q != 1 or selection.n_q != 1 or not _waits(selection) or _positions(options):
            return self.add(share * computed_pairs(n_q, n_k, selection, options), 0.0)
        self.waiting.append((share, selection.n_k, Lengths.of(selection)))
        if len(self.waiting) >= WAITING:
            self.settle()

    def settle(self) -> None:
        if self.waiting:
            means = torch.stack([lengths.mean() for *_, lengths in self.waiting]).tolist()
            for (share, n_k, _), listed in zip(self.waiting, means, strict=True):
                self.known += share * min(listed, float(n_k))
            self.waiting.clear()

    @property
    def computed(self) -> float:
        self.settle()
        return self.known

    @property
    def density(self) -> float | None:
        return self.computed / self.visible if self.visible else None


@dataclass
class LayerStats:
    """prefill, decode: pairs. kept: entries held per row and head. kv_bytes, index_bytes, host_bytes: storage after the last call."""

    prefill: PairCount = field(default_factory=PairCount)
    decode: PairCount = field(default_factory=PairCount)
    kept: list[list[int]] = field(default_factory=list)
    kv_bytes: int = 0
    index_bytes: int = 0
    host_bytes: int = 0
    seen: int = 0
    compressions: int = 0


@dataclass(frozen=True)
class Stats:
    """The run since the last `reset()` or new cache.

    prefill_density, decode_density: score pairs computed / pairs that dense attention over all tokens seen would compute (None
    when there was no such call). kept: entries held, the mean over the batch, per layer and key/value head. kv_bytes: storage behind
    keys and values; index_bytes: positions, scores and indices; host_bytes: keys and values that were moved to the host's memory.
    tokens_seen: length of the sequence. per_layer: the same by layer.
    """

    prefill_density: float | None
    decode_density: float | None
    kept: list[list[int]]
    kv_bytes: int
    index_bytes: int
    host_bytes: int
    tokens_seen: int
    per_layer: list[dict[str, Any]]


def summarise(layers: dict[int, LayerStats]) -> Stats:
    prefill, decode = PairCount(), PairCount()
    kept, per_layer = [], []
    for index in sorted(layers):
        layer = layers[index]
        prefill.add(layer.prefill.computed, layer.prefill.visible)
        decode.add(layer.decode.computed, layer.decode.visible)
        mean = [round(sum(heads) / len(layer.kept)) for heads in zip(*layer.kept, strict=True)]
        kept.append(mean)
        per_layer.append({
            "layer": index, "prefill_density": layer.prefill.density, "decode_density": layer.decode.density, "kept": mean,
            "kept_by_row": layer.kept, "kv_bytes": layer.kv_bytes, "index_bytes": layer.index_bytes,
            "host_bytes": layer.host_bytes,
            "tokens_seen": layer.seen, "compressions": layer.compressions,
        })  # fmt: skip
    return Stats(
        prefill_density=prefill.density,
        decode_density=decode.density,
        kept=kept,
        kv_bytes=sum(layer.kv_bytes for layer in layers.values()),
        index_bytes=sum(layer.index_bytes for layer in layers.values()),
        host_bytes=sum(layer.host_bytes for layer in layers.values()),
        tokens_seen=max((layer.seen for layer in layers.values()), default=0),
        per_layer=per_layer,
    )


def selected_pairs(selection: Selection) -> float:
    """Pairs a selection computes, the mean over batch and heads; a single query reads what is listed, counted without arithmetic."""
    if selection.n_q != 1:
        return float(selection.pairs().double().mean())
    return min(float(Lengths.of(selection).mean()), float(selection.n_k))


def _positions(options: Mapping[str, Any]) -> bool:
    return options.get("q_positions") is not None or options.get("k_positions") is not None


def computed_pairs(n_q: int, n_k: int, selection: Selection | None, options: Mapping[str, Any]) -> float:
    """Score pairs of one attention call with the options of `saccade.ops.attend`, the mean over its batch and heads."""
    q_positions, k_positions, causal = options.get("q_positions"), options.get("k_positions"), options.get("causal", True)
    if not _positions(options) or not causal:
        if selection is not None:
            # with positions the option says what is causal, without them the selection does
            return selected_pairs(replace(selection, causal=False) if _positions(options) else selection)
        return n_q * n_k - n_q * (n_q - 1) / 2 if causal else float(n_q * n_k)
    like = q_positions if q_positions is not None else k_positions
    assert like is not None
    rows = torch.arange(n_k - n_q, n_k, device=like.device)[None, None] if q_positions is None else q_positions.long()
    if selection is not None:
        return _listed_pairs(selection, rows, k_positions)
    if k_positions is None:
        return float((rows + 1).clamp(min=0, max=n_k).sum(-1).double().mean())
    # as many keys as stand at or before the row
    places = k_positions.long().sort(-1).values
    lead = torch.broadcast_shapes(rows.shape[:-1], places.shape[:-1])
    seen = torch.searchsorted(places.expand(*lead, -1).contiguous(), rows.expand(*lead, -1).contiguous(), right=True)
    return float(seen.sum(-1).double().mean())


def _listed_pairs(selection: Selection, rows: Tensor, k_positions: Tensor | None) -> float:
    """Pairs of listed keys and rows at or after their position, the mean over batch and heads.

    A tile whose last position no row comes before counts whole, one whose first no row reaches not at all; only tiles between, which are
    those around a row's own place, are looked into.
    """
    s = selection
    ranks = [x for x in (s.starts, s.tokens, rows.unsqueeze(2), k_positions) if x is not None]
    batch, heads = (max(x.shape[axis] for x in ranks) for axis in (0, 1))

    def widened(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // x.shape[1], 1).expand(batch, *(-1 for _ in x.shape[1:]))

    starts = widened(s.starts)
    never = torch.iinfo(torch.int32).max
    places = torch.arange(s.n_k, device=s.device)[None, None] if k_positions is None else k_positions
    places = torch.nn.functional.pad(widened(places.int()), (0, s.block_k), value=never)
    # a row of padding stands before every key
    tiled = torch.nn.functional.pad(widened(rows.int()), (0, s.tiles * s.block_q - rows.shape[-1]), value=-1)
    tiled = tiled.unflatten(-1, (s.tiles, s.block_q)).sort(-1).values.contiguous()
    real = (tiled >= 0).sum(-1, keepdim=True)
    first = tiled.gather(-1, (s.block_q - real).clamp(max=s.block_q - 1))
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    if s.tokens.shape[-1]:
        tokens = widened(s.tokens).long().clamp(max=s.n_k)
        at = places.gather(-1, tokens.flatten(2)).view(tokens.shape).masked_fill_(tokens >= s.n_k, never)
        total += _single_pairs(at, widened(s.token_counts), tiled)
    # the keys of a tile stand side by side in a window
    begin = starts.long().clamp(max=s.n_k)
    listed = starts < s.n_k
    window = places.unfold(-1, s.block_k, 1)
    size = (s.n_k - begin).clamp(max=s.block_k)
    low, high = (_extremes(window, begin, sign, s.aligned) for sign in (-1, 1))
    whole = listed & (size == s.block_k) & (high <= first)
    total += (whole * size * real).sum(dtype=torch.float64)
    b, h, t, m = (listed & ~whole & (low <= tiled[..., -1:])).nonzero(as_tuple=True)
    for part in torch.arange(b.shape[0], device=s.device).split(max(1, LOOKED_INTO // s.block_k)):
        keys = window[b[part], h[part], begin[b[part], h[part], t[part], m[part]]]
        total += (s.block_q - torch.searchsorted(tiled[b[part], h[part], t[part]], keys.contiguous())).sum(dtype=torch.float64)
    return float(total) / (batch * heads)


def _single_pairs(at: Tensor, counts: Tensor, tiled: Tensor) -> Tensor:
    """Pairs of single keys, at the places `at (B, H, T or 1, M)`, of which a tile lists the first `counts (B, H, T)`, and its sorted rows
    `tiled (B, H, T, rows)`, padding first: float64."""
    if bool((at[..., 1:] >= at[..., :-1]).all()):
        # keys listed in order of their places: each row is looked up among them, in a list that tiles share as well
        seen = torch.searchsorted(at, tiled.view(*at.shape[:3], -1), right=True).view(tiled.shape)
        return seen.minimum(counts.unsqueeze(-1)).sum(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=at.device)
    shared, (batch, heads, tiles, rows) = at.shape[2] < tiled.shape[2], tiled.shape
    for part in torch.arange(tiles, device=at.device).split(max(1, LOOKED_INTO // (batch * heads * at.shape[3]))):
        listed = fill_past(at if shared else at[:, :, part], counts[:, :, part], torch.iinfo(at.dtype).max)
        total += (rows - torch.searchsorted(tiled[:, :, part], listed)).sum(dtype=torch.float64)
    return total


def _extremes(window: Tensor, begin: Tensor, sign: int, aligned: bool) -> Tensor:
    """The highest (sign 1) or lowest (-1) place of the tiles that begin at `begin (B, H, T, M)`; those past the end have the highest."""
    step = window.shape[-1] if aligned else 1
    some = window[:, :, ::step]
    table = some.amax(-1) if sign > 0 else some.amin(-1)
    return table.gather(-1, (begin // step).flatten(2).clamp(max=table.shape[-1] - 1)).view(begin.shape)
