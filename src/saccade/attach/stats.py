"""What ran in an attached model, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from saccade.core import Selection


@dataclass
class PairCount:
    """Score pairs computed and pairs dense attention would have computed, per head on average."""

    computed: float = 0.0
    visible: float = 0.0

    def add(self, computed: float, visible: float) -> None:
        self.computed += computed
        self.visible += visible

    @property
    def density(self) -> float | None:
        return self.computed / self.visible if self.visible else None


@dataclass
class LayerStats:
    """prefill, decode: pairs. kept: entries held per row and head. kv_bytes, index_bytes: storage, measured after the last call."""

    prefill: PairCount = field(default_factory=PairCount)
    decode: PairCount = field(default_factory=PairCount)
    kept: list[list[int]] = field(default_factory=list)
    kv_bytes: int = 0
    index_bytes: int = 0
    seen: int = 0
    compressions: int = 0


@dataclass(frozen=True)
class Stats:
    """The run since the last `reset()` or new cache.

    prefill_density, decode_density: score pairs computed / pairs that dense attention over all tokens seen would compute (None
    when there was no such call). kept: entries held, the mean over the batch, per layer and key/value head. kv_bytes: storage behind
    keys and values; index_bytes: positions, scores and indices. tokens_seen: length of the sequence. per_layer: the same by layer.
    """

    prefill_density: float | None
    decode_density: float | None
    kept: list[list[int]]
    kv_bytes: int
    index_bytes: int
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
            "tokens_seen": layer.seen, "compressions": layer.compressions,
        })  # fmt: skip
    return Stats(
        prefill_density=prefill.density,
        decode_density=decode.density,
        kept=kept,
        kv_bytes=sum(layer.kv_bytes for layer in layers.values()),
        index_bytes=sum(layer.index_bytes for layer in layers.values()),
        tokens_seen=max((layer.seen for layer in layers.values()), default=0),
        per_layer=per_layer,
    )


def selected_pairs(selection: Selection) -> float:
    """Pairs a selection computes, the mean over batch and heads; a single query reads what is listed, counted without arithmetic."""
    if selection.n_q != 1:
        return float(selection.pairs().double().mean())
    listed = float(selection.start_counts.double().mean()) * selection.block_k + float(selection.token_counts.double().mean())
    return min(listed, float(selection.n_k))
