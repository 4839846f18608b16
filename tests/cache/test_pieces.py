"""What attention makes of a cache of several pieces: packed heads, sealed segments, padded rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.cache.plain import Plain
from tests.cache.single import Single, random_qkv
from torch import Tensor

from saccade.cache import PackedSegment, Rectangle
from saccade.core import CachePolicy, Info, LayerContext, StoredKV
from saccade.ops import attend


@dataclass(frozen=True, kw_only=True)
class Thin(CachePolicy):
    """Keeps other entries in each head: every third, or every second; with `sealed`, encodes the 5 oldest of what is
    left."""

    info = Info(slug="thin", phase="cache", frees_memory=True)
    ragged: bool = True
    sealed: bool = False

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        n = kv.length
        picks = [torch.arange(h, n, 3 - h if self.ragged else 3) for h in range(kv.heads)]
        longest = max(len(p) for p in picks)
        indices = torch.stack([torch.nn.functional.pad(p, (0, longest - len(p))) for p in picks])
        batch = kv.keys.shape[0]
        counts = torch.tensor([[len(p) for p in picks]]).expand(batch, -1)
        kv.keep(indices.expand(batch, -1, -1), counts if self.ragged else None)
        if self.sealed:
            part = Rectangle(kv.keys[:, :, :5], kv.values[:, :, :5], {name: x[:, :, :5] for name, x in kv.side.items()})
            kv.seal(Plain(part), 5)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, kept: list[list[int]], first: int) -> Tensor:
    """Dense attention of the queries from `first` on, each head over its kept entries and what came after."""
    n = k.shape[2]
    bias = torch.full((1, q.shape[1], n - first, n), -torch.inf, dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        bias[0, h, :, kept[h // group]] = 0
        for i in range(n - first):
            bias[0, h, i, first : first + i + 1] = 0
    return attend(q[:, :, first:], k, v, causal=False, bias=bias, impl="reference").out


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("ragged", "sealed"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("step", [1, 7, 20])
def test_attention_reads_every_piece_of_the_cache(ragged: bool, sealed: bool, step: int, batch: int) -> None:
    q, k, v = random_qkv(62, batch=batch)
    single = Single(Thin(ragged=ragged, sealed=sealed))
    single.feed(q[:, :, :42], k[:, :, :42], v[:, :, :42])
    single.end_prompt()
    parts = [single.feed(*(x[:, :, i : i + step] for x in (q, k, v))) for i in range(42, 62, step)]
    kept = [list(range(h, 42, 3 - h if ragged else 3)) for h in range(2)]
    for b in range(batch):
        row = slice(b, b + 1)
        expected = masked_attention(q[row], k[row], v[row], kept, 42)
        assert (torch.cat(parts, 2)[row] - expected).abs().max() < 1e-9


def test_padded_row_is_thinned_as_if_alone() -> None:
    q, k, v = random_qkv(50, batch=2)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :11] = False
    both = Single(Thin())
    prompt = both.feed(q[:, :, :30], k[:, :, :30], v[:, :, :30], real)
    rest = both.steps(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:])
    for b, begin in ((0, 0), (1, 11)):
        row = slice(b, b + 1)
        alone = Single(Thin())
        assert (alone.feed(*(x[row, :, begin:30] for x in (q, k, v))) - prompt[row, :, begin:]).abs().max() < 1e-9
        assert (alone.steps(*(x[row, :, 30:] for x in (q, k, v))) - rest[row]).abs().max() < 1e-9
    assert (prompt[1, :, :11] == 0).all()


def test_heads_of_unequal_length_are_packed_storage() -> None:
    q, k, v = (x.float() for x in random_qkv(600, kv_heads=2, dim=16))
    single = Single(Thin())
    single.feed(q, k, v)
    dense = single.layer.kv_bytes
    single.end_prompt()
    (packed,) = (s for s in single.layer.segments if isinstance(s, PackedSegment))
    assert packed.lengths() == [[200, 300]] and packed.offsets == [0, 200, 500]
    assert packed.keys.shape == (500, 16)
    assert dense >= 2 * 2 * 600 * 16 * 4
    # nothing beside the packed entries: 500 of 1200 of them
    assert single.layer.kv_bytes == 2 * 500 * 16 * 4
    single.steps(*(x[:, :, :3] for x in (q, k, v)))
    assert single.layer.lengths() == [[203, 303]]


def test_reset_forgets_everything() -> None:
    q, k, v = random_qkv(30, batch=2)
    single = Single(Thin())
    single.feed(q, k, v, torch.arange(30).expand(2, -1) > torch.tensor([[0], [5]]))
    single.end_prompt()
    layer = single.layer
    layer.reset()
    assert (layer.seen, layer.physical, layer.kv_bytes, layer.side_bytes, layer.lengths()) == (0, 0, 0, 0, [])
    assert not layer.padded and layer.keys is None and not layer.is_initialized
    fresh = Single(None)
    assert torch.equal(Single.feed(single, q, k, v), fresh.feed(q, k, v))


def test_a_new_segment_must_hold_what_it_replaces() -> None:
    q, k, v = random_qkv(20)
    single = Single(None)
    single.feed(q, k, v)
    slots = single.layer.open()
    side = {name: x[:, :, :3] for name, x in slots.side.items()}
    part = Rectangle(slots.keys[:, :, :3], slots.values[:, :, :3], side)
    with pytest.raises(ValueError, match=r"seal\(4\) with a segment of 3 entries over 20"):
        slots.seal(Plain(part), 4)
    with pytest.raises(ValueError, match="expected"):
        slots.keep(torch.zeros(1, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="rewrite was given keys"):
        slots.rewrite(keys=slots.keys[:, :, :5])
    with pytest.raises(ValueError, match="negative number"):
        single.layer.crop(3)
