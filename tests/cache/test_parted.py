"""Segments in parts: entries of one kind together, outputs merged, rows and heads of different lengths."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.cache import KVLayer, Slots, parted
from saccade.cache.parted import Encoder, Part, PartedSegment
from saccade.cache.segment import CHUNK, Rectangle
from saccade.cache.stores import PlainStore, Store, by_channel, by_token, by_token_over_heads, channel_factor
from saccade.core import Partial, Rotary
from saccade.ops import attend
from saccade.ops.record import last_run
from saccade.parts.rotary import turn

ROTARY = Rotary(10000.0 ** (-torch.arange(4) / 4))


def entries(batch: int = 2, heads: int = 3, n: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64) for dim in (8, 16))
    return keys, values, {"positions": torch.arange(7, 7 + n, dtype=torch.int32).expand(batch, heads, n)}


def plain(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return PlainStore(k), PlainStore(v)


def coded(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return by_channel(k, 8), by_token(v, 8, 8, rotate=True)


def over_heads(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return by_channel(k, 4, 16), by_token_over_heads(v, 4, channel_factor(v))


def mixed(n: int = 50, batch: int = 2, seed: int = 0) -> tuple[PartedSegment, Tensor, Tensor]:
    keys, values, side = entries(batch, n=n, seed=seed)
    classes = torch.randint(0, 3, (batch, n), generator=torch.Generator().manual_seed(seed))
    return PartedSegment.by_class(keys, values, side, classes, [plain, coded, over_heads]), keys, values


def same(a: Partial, b: Partial) -> None:
    assert float((a.out - b.out).abs().max()) < 1e-9 and a.lse is not None and b.lse is not None
    assert float((a.lse - b.lse).abs().max()) < 1e-9


def by_hand(q: Tensor, part: Rectangle, scale: float, softcap: float | None = None) -> Partial:
    """Attention over a rectangle with gaps, in full."""
    logits = (q.unflatten(1, (part.keys.shape[1], -1)) @ part.keys.unsqueeze(2).mT) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if part.valid is not None:
        logits = logits.masked_fill(~part.valid[:, :, None, None], -torch.inf)
    out = torch.softmax(logits, -1).nan_to_num(0.0) @ part.values.unsqueeze(2)
    return Partial(out.flatten(1, 2), torch.logsumexp(logits, -1).flatten(1, 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([1, 3, 20]), st.sampled_from([None, 2.0]))
def test_parts_together_are_attention_over_what_they_hold(seed: int, n: int, m: int, softcap: float | None) -> None:
    segment, keys, values = mixed(n, seed=seed)
    part = segment.read(0, n)
    assert part.valid is None and torch.equal(part.side["positions"], torch.arange(7, 7 + n, dtype=torch.int32).expand(2, 3, n))
    assert float((part.keys - keys).abs().max()) < 0.5 and float((part.values - values).abs().max()) < 0.5
    q = torch.randn(2, 6, m, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    same(segment.attend(q, scale=0.4, softcap=softcap), by_hand(q, part, 0.4, softcap))


def test_codes_are_read_by_the_fused_op() -> None:
    segment, _, _ = mixed()
    q = torch.randn(2, 6, 1, 8, dtype=torch.float64)
    for part in segment.parts[1:]:
        part.attend(q, scale=0.4, softcap=None)
        run = last_run()
        assert run is not None and run.op == "decode" and run.n_k == part.keys.length


@pytest.mark.parametrize("encoder", [plain, coded, over_heads])
def test_one_call_reads_a_long_part_whatever_its_heads_hold(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parted, "runs_on", lambda _: True)  # as on a GPU, where plain entries are read in one call too
    keys, values, side = entries(n=CHUNK + 32)
    side["positions"] = torch.stack([side["positions"][:, 0] * (h + 1) for h in range(3)], 1)
    whole = PartedSegment.by_class(keys, values, side, torch.zeros(2, CHUNK + 32, dtype=torch.int64), [encoder])
    q = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    for segment in (whole, whole.before(CHUNK + 20)):
        (part,) = segment.parts
        assert part.uneven == (segment is not whole)
        same(segment.attend(q, scale=0.4, softcap=None), by_hand(q, segment.read(0, segment.length), 0.4))
        run = last_run()
        assert run is not None and run.op == "decode" and run.n_k == CHUNK + 32
        assert run.heads == (2 if part.uneven else 6), "heads are rows of their own where they differ"


def test_classes_may_differ_by_head() -> None:
    keys, values, side = entries()
    classes = torch.randint(0, 3, (2, 3, 50), generator=torch.Generator().manual_seed(4))
    segment = PartedSegment.by_class(keys, values, side, classes, [plain, coded])
    assert segment.lengths() == (classes < 2).sum(-1).tolist() and len({n for row in segment.lengths() for n in row}) > 1
    part = segment.read(0, segment.length)
    assert part.valid is not None
    for row, head in ((0, 0), (1, 2)):
        kept, own = classes[row, head] < 2, part.valid[row, head]
        assert torch.equal(part.side["positions"][row, head, own], side["positions"][row, head, kept])
        as_they_are = classes[row, head, kept] == 0
        assert torch.equal(part.keys[row, head, own][as_they_are], keys[row, head, classes[row, head] == 0])
    q = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    same(segment.attend(q, scale=0.4, softcap=None), by_hand(q, part, 0.4))
    taken = segment.take_rows(torch.tensor([1]))
    same(taken.attend(q[1:], scale=0.4, softcap=None), by_hand(q[1:], taken.read(0, taken.length), 0.4))


def test_kept_as_they_are_entries_are_exact_and_a_class_without_encoder_is_left_out() -> None:
    keys, values, side = entries()
    classes = torch.zeros(2, 50, dtype=torch.int64)
    classes[0, 3], classes[1, 40:] = 1, 1
    segment = PartedSegment.by_class(keys, values, side, classes, [plain])
    assert segment.lengths() == [[49] * 3, [40] * 3] and segment.length == 49
    part = segment.read(0, 49)
    assert torch.equal(part.keys[0], keys[0, :, classes[0] == 0]) and torch.equal(part.values[1, :, :40], values[1, :, :40])
    assert part.valid is not None and part.valid[1].sum(-1).tolist() == [40] * 3
    with pytest.raises(ValueError, match="nothing to seal"):
        PartedSegment.by_class(keys, values, side, classes + 1, [plain])
    with pytest.raises(ValueError, match="one for each row and slot"):
        PartedSegment.by_class(keys, values, side, classes[:, :9], [plain])


def test_keys_before_the_rotary_embedding_are_turned_when_read() -> None:
    keys, values, side = entries(n=2 * CHUNK + 30, batch=1)
    places = side["positions"] * 3
    classes = (torch.arange(keys.shape[2]) >= 2).long().unsqueeze(0)
    seen: list[Tensor] = []

    def keep(k: Tensor, v: Tensor) -> tuple[Store, Store]:
        seen.append(k)
        return plain(k, v)

    segment = PartedSegment.by_class(keys, values, side, classes, [plain, keep], places=places, rotary=[None, ROTARY])
    assert torch.allclose(seen[0], turn(keys[:, :, 2:], -places[:, :, 2:], ROTARY), atol=1e-12)
    part = segment.read(0, keys.shape[2])
    assert torch.allclose(part.keys, keys, atol=1e-9)
    q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    same(segment.attend(q, scale=0.4, softcap=None), attend(q, keys, values, causal=False, scale=0.4, return_lse=True))


def test_channels_that_are_not_stored_count_as_zero() -> None:
    keys, values, side = entries()
    kept, kept_values = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 9, 15])
    thin, thin_values = torch.zeros_like(keys), torch.zeros_like(values)
    thin[..., kept], thin_values[..., kept_values] = keys[..., kept], values[..., kept_values]
    part = Part(
        keys=PlainStore(keys[..., kept]), values=PlainStore(values[..., kept_values]), positions=side["positions"],
        counts=torch.full((2, 3), 50), dims=(8, 16), key_channels=kept.to(torch.int16).expand(2, 3, 3),
        value_channels=kept_values.to(torch.int16).expand(2, 3, 4),
    )  # fmt: skip
    segment = PartedSegment([part])
    read = segment.read(0, 50)
    assert torch.equal(read.keys, thin) and torch.equal(read.values, thin_values)
    q = torch.randn(2, 6, 3, 8, dtype=torch.float64)
    same(segment.attend(q, scale=0.4, softcap=None), attend(q, thin, thin_values, causal=False, scale=0.4, return_lse=True))
    assert segment.kv_bytes == (keys[..., kept].numel() + values[..., kept_values].numel()) * 8 + (3 + 4) * 2


def test_rows_are_taken_repeated_and_bound() -> None:
    segment, _, _ = mixed()
    rows = torch.tensor([1, 1, 0])
    taken = segment.take_rows(rows)
    q = torch.randn(3, 6, 1, 8, dtype=torch.float64)
    both = [segment.attend(q[i : i + 1].expand(2, -1, -1, -1), scale=0.4, softcap=None) for i in range(3)]
    wanted = Partial(torch.stack([both[i].out[r] for i, r in enumerate(rows)]), torch.stack([both[i].lse[r] for i, r in enumerate(rows)]))  # pyright: ignore
    same(taken.attend(q, scale=0.4, softcap=None), wanted)
    assert taken.lengths() == [[50] * 3] * 3
    bound = segment.take_rows(torch.tensor([1])).bound_to(4)
    assert bound.row == 4 and segment.row is None
    same(segment.attend_row(q[:1], 1, scale=0.4, softcap=None), bound.attend_row(q[:1], 4, scale=0.4, softcap=None))
    # what heads share stays stored once: scales of tokens over all heads
    assert abs(segment.take_rows(torch.tensor([0, 1])).kv_bytes - segment.kv_bytes) < 64


def test_tokens_taken_back_are_hidden() -> None:
    segment, _, _ = mixed()
    shorter = segment.before(7 + 30)
    assert shorter.lengths() == [[30] * 3] * 2 and segment.length == 50
    whole, part = segment.read(0, 50), shorter.read(0, 30)
    assert torch.equal(part.keys, whole.keys[:, :, :30])
    q = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    wanted = by_hand(q, Rectangle(whole.keys[:, :, :30], whole.values[:, :, :30], {}), 0.4)
    same(shorter.attend(q, scale=0.4, softcap=None), wanted)
    assert segment.before(3).length == 0


def test_heads_that_hold_different_tokens_may_lose_different_numbers() -> None:
    keys, values, side = entries()
    side["positions"] = torch.stack([side["positions"][:, 0] * (h + 1) for h in range(3)], 1)
    segment = PartedSegment.by_class(keys, values, side, torch.zeros(2, 50, dtype=torch.int64), [coded]).before(40)
    counts = (side["positions"] < 40).sum(-1)
    assert segment.lengths() == counts.tolist() and len(set(counts[0].tolist())) == 3
    q = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    same(segment.attend(q, scale=0.4, softcap=None), by_hand(q, segment.read(0, segment.length), 0.4))


def test_a_layer_holds_it_and_counts_its_bytes() -> None:
    layer = KVLayer()
    keys, values, _ = entries(n=60)
    layer.update(keys, values)
    slots = layer.open()
    assert isinstance(slots, Slots)
    classes = torch.zeros(2, 40, dtype=torch.int64)
    segment = PartedSegment.by_class(
        slots.keys[:, :, :40], slots.values[:, :, :40], {"positions": slots.side["positions"][:, :, :40]}, classes, [coded]
    )
    slots.seal(segment, 40)
    layer.close([(None, slots)])
    assert layer.lengths() == [[60] * 3] * 2 and layer.tail is not None and layer.kv_bytes == segment.kv_bytes + layer.tail.kv_bytes
    other = copy.deepcopy(layer)
    layer.crop(-30)
    assert layer.lengths() == [[30] * 3] * 2 and other.lengths() == [[60] * 3] * 2
    other.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(other.segments[0].read(0, 40).keys, segment.read(0, 40).keys[[1, 0]])
    with pytest.raises(ValueError, match="not a range"):
        segment.read(3, 41)
