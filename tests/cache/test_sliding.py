"""Windows that move on in their storage: the same entries as by copying, no copy of the window, no growth."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cache.single import Single, random_qkv
from tests.contract.harness import greedy, llama, logits, tokens
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.cache import KVLayer, Rectangle, Slots
from saccade.cache.sliding import LEAST, Sliding
from saccade.cache.tail import Tail
from saccade.core import storage
from saccade.methods.cache.streaming_llm import StreamingLLM


def numbered(begin: int, m: int) -> Tensor:
    """`(1, 2, m, 3)` float64, each entry known by its number."""
    return torch.arange(begin, begin + m, dtype=torch.float64).view(1, 1, m, 1) + torch.arange(6.0).view(1, 2, 1, 3) / 10


# -- the storage -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["append", "drop", "truncate", "copy", "reorder", "save"]), st.integers(0, 9)), max_size=40))
def test_any_order_of_changes_against_lists(changes: list[tuple[str, int]]) -> None:
    held, next_number = list(range(12)), 12
    x, others = Sliding(numbered(0, 12)), []
    for change, number in changes:
        if change == "append":
            x.append(numbered(next_number, number))
            held += range(next_number, next_number + number)
            next_number += number
        elif change == "drop":
            begin = min(number // 2, len(held))
            count = min(number - begin, len(held) - begin)
            x.drop(begin, count)
            del held[begin : begin + count]
        elif change == "truncate":
            x.truncate(number + 4)
            del held[number + 4 :]
        elif change == "copy":
            # two that share a buffer: what one drops the other keeps
            others.append((copy.copy(x) if number % 2 else copy.deepcopy(x), held.copy()))
            x.drop(0, min(1, len(held)))
            del held[:1]
        elif change == "reorder":
            x = Sliding(x.reorder(torch.tensor([0])).view)
        else:
            tensors: dict[str, Tensor] = {}
            tree = storage.pack(x, tensors)
            x = storage.unpack(tree, {name: kept.clone() for name, kept in tensors.items()})
        assert x.view[0, 0, :, 0].tolist() == held and x.n == len(held)
        assert torch.equal(x.view, numbered(0, next_number)[:, :, held])
    for other, expected in others:
        assert other.view[0, 0, :, 0].tolist() == expected


@pytest.mark.parametrize("n", [24, 300])
def test_a_window_stays_where_it_is_and_does_not_grow(n: int) -> None:
    x, sizes, moved = Sliding(numbered(0, 10 * n)), set(), 0
    x.drop(4, 9 * n)
    before = x.view[:, :, 4:].data_ptr()
    for i in range(10 * n, 10 * n + 2000):
        x.append(numbered(i, 1))
        moved += before != x.view[:, :, 4:].data_ptr()
        x.drop(4, 1)
        before = x.view[:, :, 4:].data_ptr()
        sizes.add(x.nbytes)
    assert x.view[0, 0, :, 0].tolist() == [*range(4), *range(10 * n + 2004 - n, 10 * n + 2000)]
    room = max(LEAST, n // 8)
    assert len(sizes) <= 2 and max(sizes) <= (n + 1 + room) * 2 * 3 * 8
    assert moved <= 2000 // room + 1


def test_much_that_goes_frees_its_storage() -> None:
    x = Sliding(numbered(0, 5000))
    x.append(numbered(5000, 1))
    x.drop(4, 4901)
    assert x.nbytes == 100 * 6 * 8
    x.append(numbered(5001, 300))
    x.drop(10, 300)
    assert x.nbytes == 100 * 6 * 8 and x.view[0, 0, :, 0].tolist() == [*range(4), *range(4905, 4911), *range(5211, 5301)]


# -- slots -------------------------------------------------------------------------------------------------------------------


def tail_of(n: int, sliding: bool = True) -> Tail:
    positions = torch.arange(n, dtype=torch.int32).expand(1, 2, n)
    tail = Tail(Rectangle(numbered(0, n), numbered(100, n), {"positions": positions, "marks": positions % 3}))
    if sliding:
        tail.drop(0, 1)
        tail.append(numbered(n, 1), numbered(100 + n, 1), torch.tensor([n], dtype=torch.int32), None)
    return tail


def rectangle_of(tail: Tail) -> Rectangle:
    return Rectangle(tail.keys.clone(), tail.values.clone(), {name: x.clone() for name, x in tail.side.items()})


@pytest.mark.parametrize("sliding", [True, False])
def test_dropping_and_writing_in_place_equal_keeping_and_rewriting(sliding: bool) -> None:
    tail = tail_of(20, sliding)
    there, apart = Slots.over(tail), Slots(rectangle_of(tail))
    first = tail.keys[:, :, :5].clone()
    new, values = torch.randn_like(first), torch.randn_like(first)
    for slots in (there, apart):
        slots.side["later"] = torch.arange(20).expand(1, 2, 20).clone()
        slots.drop(5, 3)
        assert slots.moved and slots.reordered, "an index of slots is made anew"
        slots.write(0, keys=new, side={"marks": 7, "turned": 9})
        slots.write(2, keys=new[:, :, :2], values=values[:, :, :2])
        assert slots.moved and slots.reordered and slots.length == 17
    for a, b in ((there.rectangle, apart.rectangle), (rectangle_of(there.to_tail()), rectangle_of(apart.to_tail()))):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert a.side.keys() == b.side.keys() == {"positions", "marks", "later", "turned"}
        assert all(torch.equal(a.side[name], b.side[name]) for name in a.side)
    assert torch.equal(there.keys[:, :, :5], torch.cat([new[:, :, :2], new[:, :, :2], new[:, :, 4:]], 2))
    assert there.side["turned"][0, 0].tolist() == [9] * 5 + [0] * 12
    assert there.side["later"][0, 1].tolist() == [*range(5), *range(8, 20)]
    assert there.to_tail() is tail and apart.to_tail() is not tail
    there.keep(torch.arange(3).expand(1, 2, 3))
    assert there.to_tail() is not tail and there.to_tail().n == 3


def test_what_autograd_has_seen_is_not_changed() -> None:
    keys = numbered(0, 12).requires_grad_()
    tail = Tail(Rectangle(keys * 2, numbered(0, 12), {"positions": torch.arange(12).expand(1, 2, 12)}))
    loss = tail.keys.square().sum()
    slots = Slots.over(tail)
    slots.drop(2, 4)
    slots.write(0, keys=torch.zeros(1, 2, 2, 3, dtype=torch.float64))
    assert slots.to_tail() is not tail and slots.length == 8
    loss.backward()
    assert torch.equal(keys.grad, 8 * keys.detach())


def test_what_does_not_fit_is_refused() -> None:
    slots = Slots.over(tail_of(10))
    for begin, count in ((0, 11), (8, 3), (-1, 2), (3, -1)):
        with pytest.raises(ValueError, match=rf"drop\({begin}, {count}\) does not fit 10 entries"):
            slots.drop(begin, count)
    for wrong in (numbered(0, 3).float(), numbered(0, 3)[..., :2], numbered(0, 3)[:, :1]):
        with pytest.raises(ValueError, match=r"write\(1\) was given keys"):
            slots.write(1, keys=wrong)
    with pytest.raises(ValueError, match=r"write\(8\) was given values"):
        slots.write(8, values=numbered(0, 3))
    ragged = Slots(Rectangle(numbered(0, 4), numbered(0, 4), {}, torch.ones(1, 2, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="heads that hold different numbers"):
        ragged.drop(0, 1)
    padded = Tail(Rectangle(numbered(0, 4), numbered(0, 4), {"positions": torch.arange(4).expand(1, 2, 4)}), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match="open one row at a time"):
        padded.drop(0, 1)


def test_a_tail_that_shares_its_storage_moves_nothing_in_it() -> None:
    tail = tail_of(40)
    other = tail.twin(room=8)
    for one, its in ((tail, numbered(200, 1)), (other, numbered(300, 1))):
        one.drop(4, 1)
        one.append(its, its, torch.tensor([41], dtype=torch.int32), None)
    assert tail.keys[0, 0, :, 0].tolist() == [*range(1, 5), *range(6, 41), 200]
    assert other.keys[0, 0, :, 0].tolist() == [*range(1, 5), *range(6, 41), 300]


# -- a whole layer -----------------------------------------------------------------------------------------------------------


def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "_in_place", lambda self: None)


def test_a_long_stream_holds_constant_memory() -> None:
    q, k, v = (x.float() for x in random_qkv(64, batch=2))
    single = Single(StreamingLLM(sinks=4, window=60, positions="original"))
    sizes, storages = set(), []
    for i in range(2100):
        single.feed(*(x[:, :, i % 64][:, :, None] for x in (q, k, v)))
        if i >= 100:
            layer = single.layer
            assert layer.tail is not None and layer.tail.n == 64
            sizes.add((layer.kv_bytes, layer.side_bytes))
            storages.append(layer.tail.keys.untyped_storage().data_ptr())
    assert len(sizes) == 1 and next(iter(sizes))[0] <= (64 + 1 + LEAST) * 2 * 2 * 2 * 8 * 4
    renewed = sum(a != b for a, b in pairwise(storages))
    assert 0 < renewed <= 2000 // LEAST, "the window is copied only when its room is used up"
    assert single.kept()[0] == [0, 1, 2, 3, *range(2040, 2100)]


@pytest.mark.parametrize("beams", [1, 2])
def test_moving_in_place_changes_no_output(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decode method, whose index must be made anew when entries have moved, with beams and with tokens taken back."""
    model, ids = llama(), tokens(1, 30).repeat(1, 2)
    spec, options = "streaming-llm(sinks=3, window=40)", {"num_beams": beams} if beams > 1 else {"prompt_lookup_num_tokens": 4}

    def run() -> tuple[Tensor, ...]:
        with saccade.attach(model, cache=spec):
            written, plain = greedy(model, ids, 16, **options), logits(model, ids, steps=30)
        with saccade.attach(model, cache=spec, decode="quest(page_size=4, budget=12, dense_layers=0)"):
            return written, plain, logits(model, ids, steps=30)

    there = run()
    copying(monkeypatch)
    apart = run()
    assert torch.equal(there[0], apart[0])
    assert all(float((a - b).abs().max()) < 1e-9 for a, b in zip(there[1:], apart[1:], strict=True))


@pytest.mark.parametrize("gone", [1, 3, 19, 58])
def test_tokens_taken_back_from_a_window_that_has_moved(gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        q, k, v = random_qkv(80)
        single = Single(StreamingLLM(sinks=3, window=20, positions="original"))
        outs = [single.steps(*(x[:, :, :60] for x in (q, k, v)))]
        single.layer.crop(-gone)
        outs += [single.layer.positions().double(), single.steps(*(x[:, :, 60:] for x in (q, k, v)))]
        single.layer.reorder_cache(torch.tensor([0]))
        outs.append(single.steps(*(x[:, :, :30] for x in (q, k, v))))
        return [*outs, single.layer.positions().double(), single.layer.open().keys]

    there = run()
    copying(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(there, run(), strict=True))


def test_a_saved_or_copied_window_goes_on_by_itself(tmp_path: Path) -> None:
    model, ids = llama(), tokens(1, 60)
    with torch.no_grad(), saccade.attach(model, cache="streaming-llm(sinks=3, window=20)") as handle:
        cache = DynamicCache(config=model.config)

        def feed(into: DynamicCache, begin: int, end: int) -> Tensor:
            return torch.cat([model(ids[:, i : i + 1], past_key_values=into).logits for i in range(begin, end)], 1)

        feed(cache, 0, 45)
        kept = copy.deepcopy(cache)
        handle.save(tmp_path / "window.cache")
        last = feed(cache, 45, 60)
        layer = cache.layers[0]
        assert isinstance(layer, KVLayer) and layer.tail is not None and isinstance(layer.tail._keys, Sliding)
        assert torch.equal(feed(kept, 45, 60), last)
        assert torch.equal(feed(saccade.load_cache(tmp_path / "window.cache", model), 45, 60), last)
