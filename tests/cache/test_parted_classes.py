"""Entries in classes of different bits, in every head its own: read back in slot order, a range at a time, and attended as they lie."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.cache import KVLayer, parted
from saccade.cache.parted import PartedSegment
from saccade.cache.segment import CHUNK
from saccade.cache.stores import CodedStore
from saccade.methods.kvcomp.zipcache import in_classes as encode
from saccade.ops import decode
from saccade.ops.decode import decode_quantised
from saccade.ops.quant import word_bytes
from saccade.ops.record import last_run

few = settings(max_examples=40, deadline=None)


def entries(
    batch: int = 2, heads: int = 3, n: int = 50, dim: int = 8, value_dim: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """keys and values with channels of very different size, and positions that begin at 7."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, n, dim, generator=generator) * torch.randn(heads, 1, dim, generator=generator).exp()
    values = torch.randn(batch, heads, n, value_dim, generator=generator) * torch.randn(heads, 1, value_dim, generator=generator).exp()
    positions = torch.arange(7, 7 + n, dtype=torch.int32).expand(batch, heads, n)
    return keys.to(dtype), values.to(dtype), {"positions": positions}


def classes_of(batch: int, heads: int, counts: list[int], seed: int = 0) -> Tensor:
    """Every class as often as asked, in a different order in every row and head."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(torch.uint8)
    rows = [ids[torch.randperm(len(ids), generator=generator)] for _ in range(batch * heads)]
    return torch.stack(rows).view(batch, heads, len(ids))


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def by_hand(keys: Tensor, values: Tensor, classes: Tensor, bits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What the segment must restore, written out with loops from the definition, in float64."""
    keys, values = keys.double(), values.double()
    classes = classes.expand(*keys.shape[:3])
    channel = values.abs().amax(2, keepdim=True).sqrt()
    channel[channel == 0] = 1
    scaled = values / channel
    k, v = keys.clone(), values.clone()
    for b in range(keys.shape[0]):
        for t in range(keys.shape[2]):
            for h in range(keys.shape[1]):
                low, high = scaled[b, h, t].min(), scaled[b, h, t].max()
                width = bits[classes[b, h, t]]
                if width < 16 and high > low:
                    step = (high - low) / (2**width - 1)
                    v[b, h, t] = ((scaled[b, h, t] - low) / step).round() * step * channel[b, h, 0] + low * channel[b, h, 0]
        for h in range(keys.shape[1]):
            for index, width in enumerate(bits):
                mine = classes[b, h] == index
                if width < 16 and mine.any():
                    part = keys[b, h, mine]
                    low, step = part.amin(0), (part.amax(0) - part.amin(0)) / (2**width - 1)
                    k[b, h, mine] = ((part - low) / torch.where(step > 0, step, 1)).round() * step + low
    return k, v


@pytest.mark.parametrize("bits,counts", [((4, 2), [30, 20]), ((3,), [50]), ((8, 16, 1, 4), [10, 5, 20, 15]), ((16, 2), [1, 49])])
@pytest.mark.parametrize("shared", [False, True])
def test_read_restores_slot_order_and_the_defined_values(bits: tuple[int, ...], counts: list[int], shared: bool) -> None:
    keys, values, side = entries(dtype=torch.float64)
    classes = classes_of(2, 1 if shared else 3, counts)
    segment = encode(keys, values, side, classes[:, 0] if shared else classes, bits)
    part = segment.read(0, 50)
    k, v = by_hand(keys, values, classes, bits)
    assert torch.allclose(part.keys, k, rtol=0, atol=1e-12)
    assert torch.allclose(part.values, v, rtol=0, atol=1e-12)
    assert torch.equal(part.side["positions"], side["positions"]) and part.valid is None
    assert segment.lengths() == [[50] * 3] * 2 and segment.length == 50 and segment.encoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_restored_to_half_a_step(dtype: torch.dtype) -> None:
    keys, values, side = entries(dtype=dtype)
    classes = classes_of(2, 3, [30, 20])
    part = encode(keys, values, side, classes, (4, 2)).read(0, 50)
    assert part.keys.dtype == part.values.dtype == dtype
    k, v = by_hand(keys, values, classes, (4, 2))
    # the step next door may be taken where rounding of parameters moves a tie: compare errors, not codes
    slack = 1 + 8 * torch.finfo(dtype).eps
    for got, best, exact in ((part.keys, k, keys), (part.values, v, values)):
        allowed = (best - exact.double()).abs().amax() * slack + 8 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((got.double() - exact.double()).abs().max()) <= float(allowed)


@few
@given(st.integers(0, 10**6), st.data())
def test_a_range_is_a_slice_of_the_whole(seed: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda c: sum(c) > 0))
    n = sum(counts)
    keys, values, side = entries(n=n, seed=seed)
    bits = tuple(data.draw(st.sampled_from([1, 2, 3, 4, 8, 16])) for _ in counts)
    segment = encode(keys, values, side, classes_of(2, 3, counts, seed), bits)
    begin = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(begin + 1, n))
    whole, part = segment.read(0, n), segment.read(begin, end)
    assert torch.equal(part.keys, whole.keys[:, :, begin:end])
    assert torch.equal(part.values, whole.values[:, :, begin:end])
    assert torch.equal(part.side["positions"], whole.side["positions"][:, :, begin:end])


def test_ranges_across_chunks_and_attention_over_them() -> None:
    n = 2 * CHUNK + 777
    keys, values, side = entries(batch=1, heads=2, n=n, dim=4, value_dim=4)
    segment = encode(keys, values, side, classes_of(1, 2, [n // 3, n - n // 3]), (4, 2))
    whole = segment.read(0, n)
    for begin, end in ((CHUNK - 3, CHUNK + 5), (CHUNK, 2 * CHUNK), (2 * CHUNK - 1, n), (n - 1, n)):
        part = segment.read(begin, end)
        assert torch.equal(part.keys, whole.keys[:, :, begin:end]) and torch.equal(part.values, whole.values[:, :, begin:end])
    for m in (1, 3, 20):
        q = torch.randn(1, 6, m, 4, generator=torch.Generator().manual_seed(m))
        got = segment.attend(q, scale=0.5, softcap=None)
        logits = (q.unflatten(1, (2, 3)) @ whole.keys.unsqueeze(2).mT * 0.5).flatten(1, 2)
        expected = (logits.softmax(-1).unflatten(1, (2, 3)) @ whole.values.unsqueeze(2)).flatten(1, 2)
        assert torch.allclose(got.out, expected, atol=1e-5)
        assert got.lse is not None and torch.allclose(got.lse, logits.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("bits,position", [((4, 2), 1000), ((3, 8), 60)], ids=["whole", "cropped"])
def test_the_kernel_reads_classes_that_differ_by_head(bits: tuple[int, int], position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, 53 and 34 entries, bfloat16: at most twice the error of dense attention over the restored entries."""
    monkeypatch.setattr(parted, "decode_quantised", partial(decode_quantised, impl="triton"))
    keys, values, side = entries(1, 2, 87, 32, 24, torch.bfloat16)
    segment = encode(keys, values, side, classes_of(1, 2, [53, 34]), bits).before(position)
    assert segment.parts[0].uneven == (position < 87)
    q = torch.randn(1, 6, 1, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    part = segment.read(0, segment.length)
    k, v = by_parts(segment)
    exact = decode(q.double(), k, v, scale=0.2, return_lse=True)
    got = segment.attend(q, scale=0.2, softcap=None)
    run = last_run()
    assert run is not None and run.impl == "triton" and run.n_k == 34
    dense = decode(q, part.keys, part.values, scale=0.2, return_lse=True)
    for found, other, true in ((got.out, dense.out, exact.out), (got.lse, dense.lse, exact.lse)):
        assert found is not None and other is not None and true is not None
        assert float((found - true).norm()) <= 2 * float((other - true).norm()) + 1e-6


def by_parts(segment: PartedSegment) -> tuple[Tensor, Tensor]:
    """Keys and values in float64 by position, taken apart by hand from codes and parameters."""
    batch, heads = segment.parts[0].counts.shape
    k, v = (torch.zeros(batch, heads, segment.length, dim, dtype=torch.float64) for dim in segment.parts[0].dims)
    for part in segment.parts:
        assert isinstance(part.keys, CodedStore) and isinstance(part.values, CodedStore) and part.values.factor is not None
        own = part.keys.packed.read(dtype=torch.float64), part.values.packed.read(dtype=torch.float64) * part.values.factor.double()
        for row, head in product(range(batch), range(heads)):
            n = int(part.counts[row, head])
            at = part.positions[row, head, :n].long() - 7
            k[row, head, at], v[row, head, at] = own[0][row, head, :n], own[1][row, head, :n]
    return k, v


def test_sixteen_bits_are_lossless() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        keys, values, side = entries(dtype=dtype)
        part = encode(keys, values, side, classes_of(2, 3, [30, 20]), (16, 16)).read(0, 50)
        assert torch.equal(part.keys, keys) and torch.equal(part.values, values)


# -- bytes -------------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_codes_and_parameters() -> None:
    batch, heads, n, dim, value_dim = 2, 3, 50, 8, 5
    keys, values, side = entries(batch, heads, n, dim, value_dim)
    segment = encode(keys, values, side, classes_of(batch, heads, [30, 20]), (4, 2))
    codes = batch * heads * sum(c * (word_bytes(dim, b) + word_bytes(value_dim, b)) for c, b in ((30, 4), (20, 2)))
    key_parameters = batch * heads * 2 * dim * 2 * 4
    value_parameters = batch * heads * (2 * value_dim + 2 * n) * 4  # both classes hold the channels' sizes
    assert segment.kv_bytes == codes + key_parameters + value_parameters
    assert segment.side_bytes == batch * heads * n * 4
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for part in segment.parts for x in _tensors(part)}
    shared_factor = batch * heads * value_dim * 4
    on_host = sum(part.counts.untyped_storage().nbytes() for part in segment.parts)
    assert sum(held.values()) - on_host == segment.kv_bytes - shared_factor + segment.side_bytes
    assert encode(keys, values, side, classes_of(batch, 1, [30, 20])[:, 0], (4, 2)).side_bytes == batch * n * 4, "heads agree"


def _tensors(owner: object) -> list[Tensor]:
    if isinstance(owner, Tensor):
        return [owner]
    if isinstance(owner, dict):
        return [x for value in owner.values() for x in _tensors(value)]
    if isinstance(owner, list | tuple):
        return [x for value in owner for x in _tensors(value)]
    return [x for value in vars(owner).values() for x in _tensors(value)] if hasattr(owner, "__dict__") else []


def test_bytes_of_long_entries() -> None:
    """4 bits stay under 30% of bfloat16, 4 and 2 bits take less than a quarter of it; positions come to it."""
    n, dim = 4096, 128
    keys, values, side = entries(1, 2, n, dim, dim, torch.bfloat16)
    plain = keys.numel() * 2 + values.numel() * 2
    for bits, least, most in (((4, 4), 0.25, 0.262), ((4, 2), 0.2, 0.212)):
        segment = encode(keys, values, side, classes_of(1, 2, [2458, 1638]), bits)
        assert least < segment.kv_bytes / plain < most
        assert segment.side_bytes / plain < 0.008


# -- upkeep ------------------------------------------------------------------------------------------------------------------


def test_rows_are_taken_in_every_part() -> None:
    keys, values, side = entries(batch=3)
    classes = classes_of(3, 3, [30, 20])
    segment = encode(keys, values, side, classes, (4, 2))
    rows = torch.tensor([2, 0, 2, 1])
    taken, whole = segment.take_rows(rows).read(3, 47), segment.read(3, 47)
    assert torch.equal(taken.keys, whole.keys[rows]) and torch.equal(taken.values, whole.values[rows])
    assert segment.take_rows(rows).lengths() == [[50] * 3] * 4
    q = torch.randn(1, 6, 1, 8)
    one = segment.attend_row(q, 1, scale=1.0, softcap=None)
    alone = decode(q, segment.read(0, 50).keys[1:2], segment.read(0, 50).values[1:2], scale=1.0, return_lse=True)
    assert torch.allclose(one.out, alone.out, atol=1e-6)


def test_bound_copies_share_storage_and_name_their_row() -> None:
    keys, values, side = entries(batch=1)
    segment = encode(keys, values, side, classes_of(1, 3, [50]), (4,))
    other = segment.bound_to(3)
    assert (segment.row, other.row) == (None, 3)
    assert torch.equal(other.read(0, 50).keys, segment.read(0, 50).keys)
    q = torch.randn(1, 3, 1, 8)
    assert torch.equal(other.attend_row(q, 3, scale=1.0, softcap=None).out, segment.attend(q, scale=1.0, softcap=None).out)


@pytest.mark.parametrize("position", [8, 30, 56, 57, 1000])
def test_before_hides_the_last_entries_exactly(position: int) -> None:
    keys, values, side = entries()
    segment = encode(keys, values, side, classes_of(2, 3, [30, 20]), (4, 2))
    left = min(max(position - 7, 0), 50)
    cropped = segment.before(position)
    assert cropped.length == left and cropped.lengths() == [[left] * 3] * 2 and segment.length == 50
    assert cropped.kv_bytes == segment.kv_bytes
    whole, part = segment.read(0, 50), cropped.read(0, left)
    assert torch.equal(part.keys, whole.keys[:, :, :left]) and part.valid is None
    q = torch.randn(2, 6, 1, 8)
    expected = decode(q, whole.keys[:, :, :left], whole.values[:, :, :left], scale=1.0, return_lse=True)
    got = cropped.attend(q, scale=1.0, softcap=None)
    assert torch.allclose(got.out, expected.out, atol=1e-5)
    assert cropped.before(position + 5).length == left  # what is hidden stays hidden
    with pytest.raises(ValueError, match="not a range"):
        cropped.read(0, left + 1)


def test_before_everything_leaves_nothing() -> None:
    keys, values, side = entries()
    assert encode(keys, values, side, classes_of(2, 3, [50]), (4,)).before(7).length == 0


def test_before_where_heads_hold_different_tokens() -> None:
    keys, values, side = entries(batch=1, heads=2)
    side["positions"] = torch.stack([torch.arange(50), torch.arange(50) * 2])[None].to(torch.int32)
    segment = encode(keys, values, side, classes_of(1, 2, [30, 20]), (4, 2))
    cropped = segment.before(40)
    assert cropped.lengths() == [[40, 20]] and cropped.length == 40
    part = cropped.read(10, 30)
    assert part.valid is not None and part.valid.sum(-1).tolist() == [[20, 10]]
    q = torch.randn(1, 4, 2, 8)
    got = cropped.attend(q, scale=0.7, softcap=None)
    whole = segment.read(0, 50)
    for head, n in enumerate((40, 20)):
        mine = slice(head, head + 1)
        expected = decode(
            q[:, 2 * head : 2 * head + 2], whole.keys[:, mine, :n], whole.values[:, mine, :n], scale=0.7, return_lse=True
        )
        assert torch.allclose(got.out[:, 2 * head : 2 * head + 2], expected.out, atol=1e-6)


def test_a_copy_is_independent() -> None:
    keys, values, side = entries()
    segment = encode(keys, values, side, classes_of(2, 3, [30, 20]), (4, 2))
    other = copy.deepcopy(segment)
    codes = other.parts[0].keys
    assert isinstance(codes, CodedStore)
    codes.packed.codes.zero_()
    assert not torch.equal(other.read(0, 50).keys, segment.read(0, 50).keys)


# -- edges -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_and_zero_channels_are_exact(dtype: torch.dtype) -> None:
    keys, values, side = entries(dtype=dtype)
    keys[..., 2], keys[..., 5] = 3.25, 0.0
    values[..., 1] = 0.0
    part = encode(keys, values, side, classes_of(2, 3, [30, 20]), (4, 2)).read(0, 50)
    assert torch.equal(part.keys[..., [2, 5]], keys[..., [2, 5]])
    assert bool(torch.isfinite(part.values).all())
    nothing = encode(keys * 0, values * 0, side, classes_of(2, 3, [30, 20]), (4, 2)).read(0, 50)
    assert not nothing.keys.any() and not nothing.values.any()


def test_one_entry_and_empty_classes() -> None:
    keys, values, side = entries(n=1)
    part = encode(keys, values, side, classes_of(2, 3, [0, 1]), (4, 2)).read(0, 1)
    assert torch.allclose(part.keys, keys, rtol=1e-6)
    assert part.values.shape == values.shape


def test_heads_may_have_a_class_unequally_often() -> None:
    keys, values, side = entries(dtype=torch.float64)
    classes = classes_of(2, 3, [30, 20])
    classes[0, 0], classes[1, 2, :7] = 0, 1
    segment = encode(keys, values, side, classes, (4, 2))
    k, v = by_hand(keys, values, classes, (4, 2))
    part = segment.read(0, 50)
    assert torch.allclose(part.keys, k, rtol=0, atol=1e-12) and torch.allclose(part.values, v, rtol=0, atol=1e-12)
    assert segment.lengths() == [[50] * 3] * 2
    q = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    expected = decode(q, k, v, scale=0.5, return_lse=True)
    assert torch.allclose(segment.attend(q, scale=0.5, softcap=None).out, expected.out, rtol=0, atol=1e-12)


def test_arguments_that_do_not_fit_are_refused() -> None:
    keys, values, side = entries()
    good = classes_of(2, 3, [30, 20])
    with pytest.raises(ValueError, match="one for each row and slot"):
        encode(keys, values, side, good[:, :2], (4, 2))
    with pytest.raises(ValueError, match="is not one of"):
        encode(keys, values, side, good, (4, 9))
    with pytest.raises(ValueError, match="nothing to seal"):
        encode(keys, values, side, good + 2, (4, 2))
    keys[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        encode(keys, values, side, good, (4, 2))


# -- in a layer --------------------------------------------------------------------------------------------------------------


def test_a_layer_crops_into_a_sealed_segment_and_goes_on() -> None:
    keys, values, _ = entries(n=60)
    layer = KVLayer()
    layer.update(keys[:, :, :50], values[:, :, :50])
    slots = layer.open()
    segment = encode(slots.keys, slots.values, slots.side, classes_of(2, 3, [30, 20]), (4, 2))
    slots.seal(segment, 50)
    layer.close([(None, slots)])
    layer.update(keys[:, :, 50:], values[:, :, 50:])
    assert (layer.seen, layer.physical, layer.lengths()) == (60, 60, [[60] * 3] * 2)
    layer.crop(-25)
    assert (layer.seen, layer.physical, layer.lengths()) == (35, 35, [[35] * 3] * 2)
    layer.update(keys[:, :, 35:40], values[:, :, 35:40])
    assert layer.positions()[0, 0].tolist() == [35, 36, 37, 38, 39]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.lengths() == [[40] * 3] * 2
    assert torch.equal(layer.segments[0].read(0, 35).keys[0], segment.read(0, 35).keys[1])
