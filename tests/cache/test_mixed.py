"""Single entries of sealed segments, and attention over chosen slots of segments and tail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.cache.codebook import CodebookStore
from saccade.cache.counted import CountedSegment
from saccade.cache.factored import FactoredSegment, Maps
from saccade.cache.mixed import MixedEntries, ragged_rows
from saccade.cache.offloaded import OffloadedSegment
from saccade.cache.parted import Encoder, Part, PartedSegment
from saccade.cache.rotated import Bases, RotatedSegment
from saccade.cache.segment import Segment
from saccade.cache.stores import PlainStore, Store, by_channel, by_token, by_token_in_heads, by_token_over_heads, channel_factor
from saccade.core import Rotary, Selection
from saccade.ops import decode
from saccade.parts.pick import read_pages, read_tokens

HEADS, DIM, N = 2, 8, 90
ROTARY = Rotary(10000.0 ** (-torch.arange(4) / 4))
GENERATOR = torch.Generator().manual_seed(0)


def entries(n: int = N, batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    keys, values = (torch.randn(batch, HEADS, n, DIM, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    return keys, values, {"positions": torch.arange(n, dtype=torch.int32).expand(batch, HEADS, n)}


def classes(count: int, n: int = N, batch: int = 2) -> Tensor:
    """Classes per head, each equally often in every row and head."""
    each = torch.arange(n) % count
    rows = [each[torch.randperm(n, generator=GENERATOR)] for _ in range(batch * HEADS)]
    return torch.stack(rows).view(batch, HEADS, n).to(torch.uint8)


def plain(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return PlainStore(k), PlainStore(v)


def quantised(*bits: int) -> Segment:
    """Classes of each head's own."""
    keys, values, side = entries()
    factor = channel_factor(values)

    def encoder(width: int) -> Encoder:
        return lambda k, v: plain(k, v) if width == 16 else (by_channel(k, width), by_token_in_heads(v, width, factor))

    return PartedSegment.by_class(keys, values, side, classes(len(bits)), [encoder(width) for width in bits])


def coded(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return by_channel(k, 4, 16), by_token(v, 8, 4, rotate=True)


def over_heads(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return by_channel(k, 8), by_token_over_heads(v, 4, channel_factor(v))


def booked(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    levels = torch.linspace(-1, 1, 8, dtype=k.dtype)
    half = k.abs().amax(2, keepdim=True)[0]
    by_own = v.abs().amax(-1, keepdim=True)
    keys = CodebookStore.encode(k, 3, levels, levels, torch.zeros_like(half), half, k.abs() > 1.5)
    return keys, CodebookStore.encode(v, 3, levels, levels, torch.zeros_like(by_own), by_own, v.abs() > 1.5)


def parted(rotary: bool = False) -> Segment:
    keys, values, side = entries()
    own = torch.stack([torch.arange(N)[torch.randperm(N, generator=GENERATOR)] % 4 for _ in range(2)])
    turned = [None, ROTARY, ROTARY, None] if rotary else None
    return PartedSegment.by_class(keys, values, side, own, [plain, coded, booked, over_heads], places=side["positions"], rotary=turned)


def thinned() -> Segment:
    """Some channels only, in coded keys."""
    keys, values, side = entries()
    channels = torch.tensor([[0, 2, 3, 7], [1, 2, 5, 6]], dtype=torch.int16).expand(2, -1, -1)
    thin = [x.gather(3, channels.long().unsqueeze(2).expand(-1, -1, N, -1)) for x in (keys, values)]
    return PartedSegment([Part(
        keys=by_channel(thin[0], 4, 16), values=PlainStore(thin[1]), positions=side["positions"], counts=torch.full((2, HEADS), N),
        dims=(DIM, DIM), key_channels=channels, value_channels=channels,
    )])  # fmt: skip


def factored(bits: int | None) -> Segment:
    keys, values, side = entries()
    wide = HEADS * DIM

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)

    key_maps, value_maps = (Maps.of(random(wide, 6), random(6, wide), random(wide), HEADS) for _ in range(2))
    return FactoredSegment.encode(
        keys, values, side["positions"], key_maps, value_maps, rotary=ROTARY, places=side["positions"], bits=bits
    )  # fmt: skip


def rotated() -> Segment:
    keys, values, side = entries()
    bases = [torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=GENERATOR, dtype=torch.float64))[0] for _ in range(2)]
    means = torch.randn(2, HEADS, DIM, generator=GENERATOR, dtype=torch.float64)
    given = Bases(key_basis=bases[0], key_mean=means[0], value_basis=bases[1], value_mean=means[1])
    return RotatedSegment.encode(keys, values, side["positions"], given, [(3, 4), (5, 8)])


def offloaded() -> Segment:
    keys, values, side = entries()
    return OffloadedSegment.of(keys, values, side, begin=0, near=20, rotary=ROTARY)


MAKERS = {
    "one class": lambda: quantised(4), "two classes": lambda: quantised(4, 2), "four classes": lambda: quantised(8, 16, 3, 1),
    "raw": lambda: quantised(16, 16), "parted": parted, "turned": lambda: parted(rotary=True), "thinned": thinned,
    "factored": lambda: factored(None), "factored in bits": lambda: factored(4), "rotated": rotated, "offloaded": offloaded,
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_gathered_entries_are_those_that_a_range_gives(name: str) -> None:
    """In any order, each head its own, several times the same; after a crop and for single rows, too."""
    whole = MAKERS[name]()
    for segment in (whole, whole.before(N - 7), whole.take_rows(torch.tensor([1, 1, 0]))):
        read, n = segment.read(0, segment.length), segment.length
        slots = torch.randint(0, n, (read.keys.shape[0], HEADS, 70), generator=GENERATOR)
        for found, own in zip(segment.gather(slots), (read.keys, read.values), strict=True):
            assert float((found - own.gather(2, slots.unsqueeze(-1).expand(*slots.shape, DIM))).abs().max()) < 1e-12
        pieces = [segment.read(begin, min(begin + 13, n)) for begin in range(0, n, 13)]
        for i, own in ((0, read.keys), (1, read.values)):
            assert float((torch.cat([(p.keys, p.values)[i] for p in pieces], 2) - own).abs().max()) < 1e-12


def mixed(tail: int = 11) -> tuple[MixedEntries, Tensor, Tensor]:
    """Segments of three kinds and a tail, and all of it in plain form."""
    segments = (quantised(4, 2), parted(), rotated())
    k, v, _ = entries(max(tail, 1))
    k, v = k[:, :, :tail], v[:, :, :tail]
    parts = [segment.read(0, segment.length) for segment in segments]
    whole = MixedEntries(segments, k, v)
    assert whole.n == 3 * N + tail
    return whole, torch.cat([*(p.keys for p in parts), k], 2), torch.cat([*(p.values for p in parts), v], 2)


@pytest.mark.parametrize("heads", [1, HEADS, 2 * HEADS])
@pytest.mark.parametrize("tail", [0, 11])
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_attention_over_chosen_slots(heads: int, tail: int, data: st.DataObject) -> None:
    """Tiles, single slots of ragged lists, both, and weights: what `decode` gives over the plain form."""
    (own, keys, values), softcap = mixed(tail), data.draw(st.sampled_from([None, 2.0]))
    n = own.n
    q = torch.randn(2, 2 * HEADS, 1, DIM, generator=GENERATOR, dtype=torch.float64)
    pages = torch.rand(2, heads, -(-n // 16), generator=GENERATOR).topk(3, dim=-1).indices.sort(-1).values
    ids = torch.rand(2, heads, n, generator=GENERATOR).topk(9, dim=-1).indices.sort(-1).values
    counts = torch.randint(0, 10, (2, heads, 1), generator=GENERATOR)
    ragged = Selection.from_positions(ids.unsqueeze(2), n_q=1, n_k=n, counts=counts)
    tiles, singles = read_pages(pages, 16, n), read_tokens(ids, n)
    weighted = replace(singles, log_weight=torch.randn(singles.tokens.shape, generator=GENERATOR))
    selection = data.draw(st.sampled_from([tiles, singles, ragged, tiles | singles, weighted]))
    found = own.attend(q, selection, scale=0.3, softcap=softcap)
    wanted = decode(q, keys, values, selection, scale=0.3, softcap=softcap, return_lse=True, impl="reference")
    assert float((found.out - wanted.out).abs().max()) < 1e-9
    assert found.lse is not None and wanted.lse is not None
    assert torch.allclose(found.lse, wanted.lse, atol=1e-9)


def test_all_slots_and_what_every_key_gives() -> None:
    own, keys, values = mixed()
    q = torch.randn(2, 4, 1, DIM, generator=GENERATOR, dtype=torch.float64)
    wanted = decode(q, keys, values, scale=0.3, return_lse=True, impl="reference")
    for selection in (None, Selection.full(1, own.n, block_q=1), read_tokens(torch.arange(own.n).expand(2, 2, -1), own.n)):
        assert float((own.attend(q, selection, scale=0.3, softcap=None).out - wanted.out).abs().max()) < 1e-9
    logits = own.dots(q.squeeze(2))
    assert torch.allclose(logits, (q.unflatten(1, (HEADS, -1)) @ keys.unsqueeze(2).mT).flatten(1, 2).squeeze(2), atol=1e-9)
    out = own.weighted_values((0.3 * logits).softmax(-1))
    assert float((out - wanted.out.squeeze(2)).abs().max()) < 1e-9
    for start in (0, 5, N, 3 * N + 4, own.n):
        pieces = list(own.pieces(start))
        assert sum(k.shape[2] for _, k, _ in pieces) == own.n - start
        assert all(torch.allclose(k, keys[:, :, at : at + k.shape[2]]) for at, k, _ in pieces)


def test_only_what_is_chosen_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _, _ = mixed()
    gathered: list[int] = []

    def spied(segment: PartedSegment, slots: Tensor) -> tuple[Tensor, Tensor]:
        gathered.append(slots.shape[2])
        return real(segment, slots)

    def never(*_: object) -> None:
        raise AssertionError("a whole range was decoded")

    real = PartedSegment.gather
    monkeypatch.setattr(PartedSegment, "gather", spied)
    for kind in (PartedSegment, RotatedSegment):
        monkeypatch.setattr(kind, "read", never)
    q = torch.randn(2, 4, 1, DIM, generator=GENERATOR, dtype=torch.float64)
    own.attend(q, read_tokens(torch.tensor([3, 50, 88, N + 3, 3 * N + 1]).expand(2, HEADS, -1), own.n), scale=1.0, softcap=None)
    assert gathered == [3, 1]
    own.attend(q, read_tokens(torch.tensor([N + 3, 3 * N + 1]).expand(2, HEADS, -1), own.n), scale=1.0, softcap=None)
    assert gathered == [3, 1, 1], "a segment without a chosen entry is left alone"


def test_shapes_hold_nothing_and_uneven_segments_are_refused() -> None:
    own, keys, values = mixed()
    for shown, real in zip(own.shapes, (keys, values), strict=True):
        assert shown.shape == real.shape and shown.dtype == real.dtype and bool(shown.isnan().all())
        assert shown.untyped_storage().nbytes() == shown.itemsize
    k, v, side = entries()
    uneven = PartedSegment([Part(keys=PlainStore(k), values=PlainStore(v), positions=side["positions"],
                                 counts=torch.tensor([[N, N], [N, N - 1]]), dims=(DIM, DIM))])  # fmt: skip
    assert ragged_rows([uneven]) and not ragged_rows([quantised(4)])
    with pytest.raises(ValueError, match="different numbers of encoded entries"):
        MixedEntries((uneven,), k, v)
    gone = torch.ones(2, HEADS, N, dtype=torch.bool)
    with pytest.raises(ValueError, match="stand for several tokens"):
        MixedEntries((CountedSegment.folding(None, k, v, side["positions"], gone),), k, v)
