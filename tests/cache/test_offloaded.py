"""Entries on the host: stores, segments that keep their first entries near, units held on the device, streams by place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.cache.offloaded import Fetch, OffloadedSegment, OffloadedStore, RecentUnits, off_device
from saccade.cache.segment import Rectangle, attend_rectangle
from saccade.cache.stream import Stream
from saccade.core import Rotary
from saccade.parts.rotary import turn

ROTARY = Rotary(10000.0 ** (-torch.arange(4) / 4))


def entries(n: int = 40, batch: int = 2, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Keys turned to the places 7 ..., values, positions."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 3, n, dim, generator=g, dtype=torch.float64).to(device) for dim in (8, 16))
    return keys, values, {"positions": torch.arange(7, 7 + n, dtype=torch.int32, device=device).expand(batch, 3, n)}


def segment(rotary: Rotary | None = ROTARY, near: int = 5, **more) -> tuple[OffloadedSegment, Tensor, Tensor]:
    keys, values, side = entries(**more)
    return OffloadedSegment.of(keys, values, side, begin=7, near=near, rotary=rotary), keys, values


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-12


@pytest.mark.parametrize("rotary", [ROTARY, None])
@pytest.mark.parametrize("near", [0, 5, 40])
def test_what_goes_in_comes_out(rotary: Rotary | None, near: int) -> None:
    s, keys, values = segment(rotary, near)
    part = s.read(3, 30)
    assert same(part.keys, keys[:, :, 3:30]) and torch.equal(part.values, values[:, :, 3:30])
    assert part.side["positions"][0, 0].tolist() == list(range(10, 37))
    q = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, want = s.attend(q, scale=0.3, softcap=None), attend_rectangle(q, keys, values, scale=0.3, softcap=None)
    assert same(got.out, want.out)
    assert s.host_bytes == 2 * 3 * (40 - near) * 24 * 8 and s.kv_bytes == 2 * 3 * near * 24 * 8
    assert off_device([s, s]) == 2 * s.host_bytes and (s.begin, s.end) == (7, 47) and s.encoded


def test_rows_and_the_entries_before_a_token() -> None:
    s, keys, _ = segment()
    row = s.take_rows(torch.tensor([1, 1, 0]))
    assert isinstance(row, OffloadedSegment) and same(row.read(0, 40).keys, keys[[1, 1, 0]]) and row.begin == 7
    assert s.bound_to(3).row == 3 and s.row is None
    for position, left in ((100, 40), (20, 13), (10, 3), (0, 0)):
        cut = s.before(position)
        assert cut.length == left and cut.end == 7 + left
        if left:
            assert same(cut.read(0, left).keys, keys[:, :, :left])
    assert s.length == 40, "sealed entries never change"


def test_the_original_is_not_kept_alive_or_changed() -> None:
    keys, values, side = entries()
    before = values.clone()
    s = OffloadedSegment.of(keys, values, side, begin=7, near=5)
    values.zero_()
    keys.zero_()
    assert torch.equal(s.read(0, 40).values, before)


def test_picking_entries_and_runs() -> None:
    _, values, _ = entries()
    store = OffloadedStore.of(values)
    ids = torch.randint(0, 40, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(store.pick(ids).result(), values.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, 16)))
    runs = store.pick_runs(torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([8, 36]), 4).result()
    assert torch.equal(runs, torch.stack([values[1, 2, 8:12], values[0, 0, 36:40]]))
    assert store.nbytes == 0 and store.host_bytes == values.numel() * 8
    assert torch.equal(store.read(3, 9), values[:, :, 3:9])


def test_nothing_to_seal_is_refused() -> None:
    keys, values, side = entries()
    for n, near in ((0, 0), (4, 5)):
        with pytest.raises(ValueError, match="stay on the device"):
            OffloadedSegment.of(keys[:, :, :n], values[:, :, :n], side, begin=0, near=near)


# -- units -----------------------------------------------------------------------------------------------------------------


def units(asked: list[tuple[int, int, int]]):
    """A loader of units whose content is (row, list, unit), which writes down what it was asked for."""

    def load(rows: Tensor, lists: Tensor, ids: Tensor):
        asked.extend(zip(rows.tolist(), lists.tolist(), ids.tolist(), strict=True))
        return lambda: [torch.stack([rows, lists, ids], -1), ids.float()]

    return load


def test_units_come_once_and_the_least_recently_used_go() -> None:
    asked: list[tuple[int, int, int]] = []
    recent = RecentUnits(4)

    def read(*ids: int) -> list[int]:
        asked.clear()
        wanted = torch.tensor(ids).expand(2, 1, -1) + 100 * torch.tensor([0, 1]).view(2, 1, 1)
        content, number = recent.begin(wanted, units(asked))()
        assert torch.equal(content[..., 2], wanted) and torch.equal(number, wanted.float())
        assert torch.equal(content[..., 0], torch.tensor([0, 1]).view(2, 1, 1).expand_as(wanted))
        return [unit for row, _, unit in asked if row == 0]

    assert read(3, 9) == [3, 9]
    assert read(3, 5) == [5]
    assert read(1) == [1]
    assert read(7) == [7], "9 goes: it was read first"
    assert read(3, 5, 1, 7) == []
    assert read(9, 3) == [9], "of units read at the same time the first slot goes: that of 7"
    assert read(5, 1) == []
    assert read(7) == [7]
    assert recent.loaded == 2 * 7
    recent.forget_from(5)
    assert read(1, 9) == [9], "1 is what it was"
    with pytest.raises(ValueError, match="room for 4"):
        read(1, 2, 3, 4, 5)


def test_rows_of_held_units_are_reordered() -> None:
    asked: list[tuple[int, int, int]] = []
    recent = RecentUnits(3)
    recent.begin(torch.tensor([[[1, 2]], [[8, 9]]]), units(asked))()
    turned, before = recent.reorder(torch.tensor([1, 1])), len(asked)
    content, _ = turned.begin(torch.tensor([[[9]], [[8]]]), units(asked))()
    assert content[..., 2].tolist() == [[[9]], [[8]]] and len(asked) == before
    assert turned.nbytes == recent.nbytes > 0


# -- streams ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [ROTARY, None])
def test_a_stream_is_read_by_place_wherever_it_lies(rotary: Rotary | None) -> None:
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 50, dim, generator=g, dtype=torch.float64) for dim in (8, 16))
    places = torch.arange(50)
    turned = keys if rotary is None else turn(keys, places, rotary)
    side = {"positions": places.to(torch.int32).expand(2, 3, 50)}

    def sealed(begin: int, end: int, near: int) -> OffloadedSegment:
        here = slice(begin, end)
        part = {"positions": side["positions"][:, :, here]}
        return OffloadedSegment.of(turned[:, :, here], values[:, :, here], part, begin=begin, near=near, rotary=rotary)

    stream = Stream([sealed(0, 20, 4), sealed(20, 33, 0)], turned[:, :, 33:], values[:, :, 33:], rotary)
    assert stream.n == 50
    for begin, end in ((0, 50), (2, 9), (15, 35), (33, 50), (40, 41), (12, 12)):
        k, v = stream.turned(begin, end)
        assert same(k, turned[:, :, begin:end]) if begin < end else k.shape[2] == 0
        assert torch.equal(v, values[:, :, begin:end])
    wanted = torch.stack([torch.randperm(50, generator=g)[:17] for _ in range(2)])
    k, v = stream.unturned(wanted)
    index = wanted[:, None, :, None]
    assert same(k, keys.gather(2, index.expand(-1, 3, -1, 8))) and torch.equal(v, values.gather(2, index.expand(-1, 3, -1, 16)))
    k, _ = stream.begin(torch.tensor([1]), torch.tensor([[30, 2, 49]]))()
    assert same(k[0], keys[1, :, [30, 2, 49]])


# -- an accelerator --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_cuda_rows_lie_in_pinned_memory_and_come_on_a_stream_of_their_own() -> None:
    keys, values, side = entries(device="cuda")
    s = OffloadedSegment.of(keys, values, side, begin=7, near=5, rotary=ROTARY)
    store = s.parts[1].values
    assert isinstance(store, OffloadedStore) and store.entries.is_pinned() and store.device.type == "cuda"
    fetch = store.pick(torch.zeros(2, 3, 4, dtype=torch.int64, device="cuda"))
    assert fetch.stream is not None and fetch.result().device.type == "cuda"
    part: Rectangle = s.read(0, 40)
    assert part.keys.device.type == "cuda" and same(part.keys, keys) and torch.equal(part.values, values)
    assert torch.equal(Fetch.begin(torch.arange(5), torch.device("cuda")).result().cpu(), torch.arange(5))
