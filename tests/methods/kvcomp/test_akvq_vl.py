"""AKVQ-VL: what the rotation saves, which tokens keep their bits, and what a cache of two bits takes."""

from __future__ import annotations

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.kvcomp.stage import OPTIONS, answered, generate, llama, needle, pocket_layers, run, tokens
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import capture
from saccade.cache.parted import PartedSegment
from saccade.cache.stores import CodedStore, PlainStore, by_token
from saccade.methods.kvcomp.akvq_vl import AKVQVL, favours_text, pivot_share
from saccade.ops import attend
from saccade.ops.decode import Packed, decode
from saccade.ops.quant import hadamard

SHORT = "akvq-vl(recent=8, pivots=3, interval=4)"


def stores(segment: PartedSegment) -> list[tuple[int, int]]:
    """Bits and number of entries of each part."""
    found = []
    for part in segment.parts:
        bits = part.keys.packed.bits if isinstance(part.keys, CodedStore) else 16
        found.append((bits, part.keys.length))
    return found


def loud_keys(n: int = 256, dim: int = 128) -> Tensor:
    """Keys of which two channels are twenty times larger."""
    keys = torch.randn(1, 2, n, dim, generator=torch.Generator().manual_seed(0))
    keys[..., [5, 77]] *= 20
    return keys


# -- the quantiser -----------------------------------------------------------------------------------------------------------


def test_rotation_halves_the_error_of_two_bits_on_keys_with_outlier_channels() -> None:
    """Where levels begin at the minimum, an outlier moves all quiet channels; a whole zero point keeps them at 0, which helps by itself."""
    keys = loud_keys()

    def error(restored: Tensor) -> float:
        return float(((restored - keys).norm(dim=-1) / keys.norm(dim=-1)).mean())

    from_minimum = [error(Packed.of(keys, 2, granularity="token", rotate=rotate).read()) for rotate in (False, True)]
    whole_zero = [error(by_token(keys, 2, 128, rotate=rotate).read(0, 256)) for rotate in (False, True)]
    assert from_minimum[1] < 0.5 * from_minimum[0] and from_minimum[0] > 1
    assert whole_zero[1] < 0.9 * whole_zero[0] and whole_zero[1] < from_minimum[1]
    rms = keys.square().mean().sqrt()
    assert float(keys.abs().max() / rms) > 20 and float(hadamard(keys).abs().max() / rms) < 5


def test_a_rotated_path_without_quantisation_is_plain_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=generator) for h, n in ((6, 3), (2, 50), (2, 50)))
    plain = attend(q, k, v, causal=False).out
    turned = attend(hadamard(q), hadamard(k), hadamard(v), causal=False).out
    assert float((hadamard(turned) - plain).abs().max()) < 1e-5
    # folded into the weights of a layer: x W_V H, and H^T W_O, with one H for a group's heads
    x, w_v, w_o = (torch.randn(n, m, generator=generator) for n, m in ((50, 96), (96, 64), (64, 96)))
    weights = torch.softmax(torch.randn(50, 50, generator=generator), -1)
    folded = weights @ (x @ hadamard(w_v)) @ hadamard(w_o.T).T
    assert torch.allclose(folded, weights @ (x @ w_v) @ w_o, atol=1e-3, rtol=1e-4)


def test_codes_follow_the_definition() -> None:
    x = torch.randn(1, 1, 7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    restored = by_token(x, 2, 8, clip=0.8).read(0, 7)
    for t in range(7):
        for group in (slice(0, 8), slice(8, 16)):
            part = x[0, 0, t, group]
            low, high = 0.8 * part.min(), 0.8 * part.max()
            s = (high - low) / 3
            z = -(low / s).round()
            wanted = s * (((part / s).round() + z).clamp(0, 3) - z)
            assert torch.allclose(restored[0, 0, t, group], wanted, atol=1e-12)


def test_a_constant_vector_is_restored() -> None:
    x = torch.full((1, 1, 3, 8), 0.7)
    assert torch.allclose(by_token(x, 2, 128, clip=1.0).read(0, 3), x)


# -- which tokens keep their bits --------------------------------------------------------------------------------------------


def test_a_layer_favours_text_unless_images_or_few_tokens_draw_attention() -> None:
    vision = torch.arange(60).expand(4, 60) >= 30
    received = torch.ones(4, 60)
    received[0, :30] = 3.0  # text
    received[1, :30] = 1.5  # not clearly
    received[2, [7, 40]] = 500.0  # two pivots
    received[3, :5] = 30.0  # the first positions are no text
    assert favours_text(received, vision, 3).tolist() == [True, False, False, False]
    assert favours_text(received[3:], torch.zeros(1, 60, dtype=torch.bool), 3).tolist() == [True]  # no image tokens at all
    assert pivot_share(torch.tensor([[1.0, 2.0, 5.0]]), 2).item() == pytest.approx(7 / 8)


def test_old_text_keeps_more_bits_than_images_in_the_layers_named() -> None:
    model, ids = llama(), tokens(2, 72)
    vision = torch.zeros(2, 70, dtype=torch.bool)
    vision[0, 10:40] = True
    vision[1, 20:31] = True
    with saccade.attach(model, cache="akvq-vl(recent=20, pivots=3, text_layers=(1,))") as handle:
        handle.mark_vision(vision)
        _, cache = run(model, ids, [70, 1, 1])
    pivots, text = (layer.segments[0] for layer in cache.layers)
    assert stores(pivots)[-1][0] == 2 and stores(pivots)[0][0] == 16 and stores(pivots)[0][1] <= 3
    assert [bits for bits, _ in stores(text)] == [4, 2]
    assert text.parts[0].counts.tolist() == [[20] * 2, [39] * 2] and text.parts[1].counts.tolist() == [[30] * 2, [11] * 2]
    assert text.parts[1].positions[0, 0, :30].tolist() == list(range(10, 40))
    assert text.lengths() == [[50, 50]] * 2
    assert text.read(0, 50).side["positions"][1, 0].tolist() == list(range(50))


def test_pivots_are_the_tokens_that_get_most_attention_and_are_chosen_once() -> None:
    model, ids = llama(), tokens(1, 90)
    with saccade.attach(model, cache="akvq-vl(recent=6, pivots=4, interval=5, text_layers=())"):
        _, cache = run(model, ids, [60, *[1] * 20])
        kept = cache.layers[0].segments[0].parts[0]
    assert isinstance(kept.keys, PlainStore)
    with torch.no_grad(), capture(model) as layers:
        model(ids[:, :60])
    layer = layers[0]
    logits = (layer.q.unflatten(1, (2, 3)) @ layer.k.mT.unsqueeze(2)) * layer.scale
    weights = torch.softmax(logits + torch.full((60, 60), -torch.inf).triu(1), -1)
    received = weights.sum((0, 1, 2)).sum(0) / torch.arange(60, 0, -1)
    best = [t for t in sorted(received.topk(4).indices.tolist()) if t < 54]
    assert kept.positions[0, 0].tolist() == best
    # intervals that are encoded later have no pivots
    assert [stores(s) for s in cache.layers[0].segments[1:]] == [[(2, 5)]] * 4


def test_bits_per_element_follow_the_classes() -> None:
    """2 + 14 n16 / T + 2 n4 / T bits, in codes and entries; parameters come on top."""
    keys, values = (torch.randn(1, 2, 300, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    classes = torch.full((1, 300), 2)
    classes[:, :15], classes[:, 15:115] = 0, 1
    method = AKVQVL()
    side = {"positions": torch.arange(300, dtype=torch.int32).expand(1, 2, 300)}
    encoders = [lambda k, v, bits=bits: method._encode(k, v, bits) for bits in (16, 4, 2)]
    segment = PartedSegment.by_class(keys, values, side, classes, encoders)
    codes = sum(
        store.packed.codes.untyped_storage().nbytes() if isinstance(store, CodedStore) else store.nbytes
        for part in segment.parts for store in (part.keys, part.values)
    )  # fmt: skip
    assert codes * 8 / (2 * 2 * 300 * 64) == pytest.approx(2 + 14 * 15 / 300 + 2 * 100 / 300)
    # a step and a zero point of 2 bytes for the 64 channels of a head
    assert segment.kv_bytes - codes == 2 * 2 * 285 * 4


def test_calibration_tells_the_kinds_of_layers() -> None:
    model = llama()
    plan = saccade.calibrate(model, SHORT, [tokens(2, 64), tokens(1, 40)])
    kinds = [bool(plan.tensor(layer, "text_layer")) for layer in range(2)]
    turned = type(plan)(**{**vars(plan), "tensors": {name: ~x for name, x in plan.tensors.items()}})
    for used, wanted in ((plan, kinds), (turned, [not kind for kind in kinds])):
        with saccade.attach(model, cache=SHORT, plan=used):
            _, cache = run(model, tokens(1, 60), [59, 1])
        for layer, text in zip(cache.layers, wanted, strict=True):
            assert (stores(layer.segments[0])[-1] == (4, 51)) == text


# -- the policy --------------------------------------------------------------------------------------------------------------


def test_the_fused_reader_gives_what_the_decoded_entries_give() -> None:
    model, ids = llama(torch.float64), tokens(2, 72)
    with saccade.attach(model, cache=SHORT):
        _, cache = run(model, ids, [70, 1, 1])
    segment = cache.layers[1].segments[0]
    for m in (1, 20):
        q = torch.randn(2, 6, m, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
        part = segment.read(0, segment.length)
        wanted = attend(q, part.keys, part.values, causal=False, scale=0.3, return_lse=True)
        got = segment.attend(q, scale=0.3, softcap=None)
        assert float((got.out - wanted.out).abs().max()) < 1e-9 and float((got.lse - wanted.lse).abs().max()) < 1e-9
    assert decode(q[:, :, :1], part.keys, part.values).out.shape == (2, 6, 1, 16)


def test_more_bits_lose_less() -> None:
    model, ids = llama(torch.float64), tokens(2, 105)
    dense, _ = run(model, ids, [100, *[1] * 5])
    errors = []
    for bits in (2, 4, 8, 16):
        with saccade.attach(model, cache=f"akvq-vl(recent=8, pivots=0, text_bits={bits}, low_bits={bits}, interval=4)"):
            got, _ = run(model, ids, [100, *[1] * 5])
        errors.append(float((got[:, 100:] - dense[:, 100:]).norm() / dense[:, 100:].norm()))
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.1 * errors[0] and errors[3] < 1e-9


def test_a_token_is_encoded_once_when_it_leaves_the_window() -> None:
    model, ids = llama(), tokens(1, 100)
    with saccade.attach(model, cache="akvq-vl(recent=10, pivots=2, interval=4)"):
        lengths = [[s.length for s in run(model, ids[:, :n], [n - 9, *[1] * 9])[1].layers[0].segments] for n in (59, 60, 15)]
    # 50 tokens, of which 40 are encoded when the prompt ends; then the tail reaches 14 in the 4th and the 8th step
    assert lengths == [[40, 4, 4], [41, 4, 4], [4]]


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache=SHORT) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        cache = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=cache)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=cache)
        assert handle.stats().kept == [[second.shape[1] - 1] * 2] * 2
        cache.crop(-70)
        assert cache.layers[0].lengths() == [[65, 65]]


def test_fields_are_validated_and_unfit_models_refused() -> None:
    wrongs = ("recent=-1", "pivots=1.5", "text_bits=5", "low_bits=0", "group=0", "clip=0", "clip=1.1", "interval=0", "text_layers=(-1,)")
    for wrong in wrongs:
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"akvq-vl({wrong})")
    with pytest.raises(ValueError, match="latent"):
        saccade.attach(tiny("deepseek-v3"), cache="akvq-vl")


# -- on the pocket model -----------------------------------------------------------------------------------------------------


def test_on_the_pocket_model_a_needle_is_found_at_four_bits() -> None:
    ids, value = needle(1024, 0.4, seed=1)
    found, share = answered(ids, value, cache="akvq-vl(recent=32, low_bits=4)", dtype=torch.bfloat16)
    assert found and share < 0.4  # a quarter, scales for heads of 64 channels, the newest tokens and the tail's room


def test_on_the_pocket_model_each_step_of_the_method_lowers_the_error() -> None:
    """Round to nearest, with the rotation, with pivots: relative error of the attention output, mean over layers."""
    layers = pocket_layers(512)
    totals = [0.0, 0.0, 0.0]
    for layer in layers:
        q, k, v = layer.q[:, :, 448:], layer.k[:, :, :448], layer.v[:, :, :448]
        exact = attend(q, k, v, causal=False, scale=layer.scale).out
        received = torch.softmax((q.unflatten(1, (2, 3)) @ k.mT.unsqueeze(2)) * layer.scale, -1).sum((0, 1, 2, 3))
        pivots = received.topk(15).indices
        for i, (rotate, protect) in enumerate(((False, False), (True, False), (True, True))):
            kk, vv = (by_token(x, 2, 128, clip=0.8, rotate=rotate).read(0, 448) for x in (k, v))
            if protect:
                kk[:, :, pivots], vv[:, :, pivots] = k[:, :, pivots], v[:, :, pivots]
            out = attend(q, kk, vv, causal=False, scale=layer.scale).out
            totals[i] += float((out - exact).norm() / exact.norm()) / len(layers)
    assert totals[2] < totals[1] < totals[0]
