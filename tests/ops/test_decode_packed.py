"""Packed caches: what decode reads from them, what they hold, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops import decode
from saccade.ops.decode import Packed, decode_quantised, folded, quantised


def packed(g: torch.Generator, n: int, dim: int = 16, **how: object) -> Packed:
    return Packed.of(torch.randn(2, 2, n, dim, generator=g), **how)


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4}, {"bits": 3, "group": 10}, {"bits": 2, "granularity": "token", "group": 4}, {"bits": 8, "symmetric": True},
        {"bits": 5, "granularity": "token", "group": 6, "symmetric": True}, {"bits": 3, "nonuniform": True, "outliers": 0.1},
        {"bits": 4, "rotate": True, "granularity": "token", "group": 16, "outliers": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_quantised_decode_is_decode_of_what_is_restored(how: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "CHUNK", 16)
    g = torch.Generator().manual_seed(9)
    q, keys, values = torch.randn(2, 4, 2, 16, generator=g), packed(g, 50, **how), packed(g, 50, **how)
    want = decode(q.double(), keys.read(dtype=torch.float64), values.read(dtype=torch.float64), return_lse=True, impl="reference")
    for impl in ("cpu", "reference"):
        got = decode_quantised(q, keys, values, return_lse=True, impl=impl)
        assert float((got.out - want.out).abs().max()) < 2e-6 and float((got.lse - want.lse).abs().max()) < 5e-6
        assert saccade.last_run().impl == impl
        short = decode_quantised(q, keys, values, lengths=torch.tensor([50, 21]), softcap=3.0, return_lse=True, impl=impl)
        restored = (x.read(dtype=torch.float64) for x in (keys, values))
        part = decode(q.double(), *restored, lengths=torch.tensor([50, 21]), softcap=3.0, impl="reference")
        assert float((short.out - part.out).abs().max()) < 2e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "key", [{"group": 7}, {"group": 16}, {"group": 99, "symmetric": True}, {"granularity": "token", "group": 8}], ids=str
)  # fmt: skip
@pytest.mark.parametrize("value", [{"granularity": "token", "group": 18}, {"granularity": "token", "group": 8}, {"group": 12}], ids=str)
def test_codes_are_multiplied_as_they_are(
    bits: int, key: dict[str, object], value: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(bits)
    q, keys, values = torch.randn(2, 6, 3, 18, generator=g), packed(g, 75, 18, bits=bits, **key), packed(g, 75, 18, bits=bits, **value)
    assert folded.takes(keys) and folded.takes(values)
    want = decode(q.double(), keys.read(dtype=torch.float64), values.read(dtype=torch.float64), return_lse=True, impl="reference")
    ends = torch.tensor([0, 41], dtype=torch.int32)
    restored = (x.read(dtype=torch.float64) for x in (keys, values))
    part = decode(q.double(), *restored, lengths=ends, softcap=3.0, return_lse=True, impl="reference")
    with monkeypatch.context() as patch:
        patch.setattr(Packed, "read_stored", None)  # no number is restored on the way
        for span, room in ((1 << 20, 1 << 20), (1 << 11, 1 << 20), (1 << 9, 36 * 20)):
            patch.setattr(folded, "SPAN", span)
            patch.setattr(folded, "ROOM", room)
            got = decode_quantised(q, keys, values, return_lse=True)
            assert float((got.out - want.out).abs().max()) < 5e-6 and float((got.lse - want.lse).abs().max()) < 1e-5
            short = decode_quantised(q, keys, values, lengths=ends, softcap=3.0, return_lse=True)
            assert float((short.out - part.out).abs().max()) < 5e-6 and torch.equal(short.lse[0], part.lse[0].float())


def test_codes_without_a_scale() -> None:
    g = torch.Generator().manual_seed(1)
    q, codes = torch.randn(1, 2, 1, 8, generator=g), torch.randint(0, 256, (1, 1, 30, 4), generator=g).to(torch.uint8)
    for granularity in ("channel", "token"):
        x = Packed(codes=codes, bits=4, dim=8, symmetric=True, granularity=granularity, group=8)
        want = decode(q, x.read(), x.read(), scale=0.02, impl="reference")
        assert float((decode_quantised(q, x, x, scale=0.02).out - want.out).abs().max()) < 5e-6


def test_packed_restores_within_half_a_step_and_keeps_outliers() -> None:
    x = torch.randn(1, 2, 37, 24, generator=torch.Generator().manual_seed(0)).double()
    x[0, 0, 3, 5] = 40.0
    for how in ({"granularity": "channel", "group": 10}, {"granularity": "token", "group": 7}):
        p = Packed.of(x, 4, **how)
        scale = p.scale.repeat_interleave(how["group"], dim=2 if how["granularity"] == "channel" else 3)[:, :, :37, :24]
        assert bool(((p.read(dtype=torch.float64) - x).abs() <= scale / 2 + 1e-6).all())
        assert torch.equal(p.read(5, 20, torch.float64), p.read(dtype=torch.float64)[:, :, 5:20])
        kept = Packed.of(x, 4, outliers=0.05, **how)
        assert abs(float(kept.read(dtype=torch.float64)[0, 0, 3, 5]) - 40.0) < 1e-9
        assert float((kept.read(dtype=torch.float64) - x).norm()) < float((p.read(dtype=torch.float64) - x).norm())


def test_packed_bytes_are_what_the_bits_say() -> None:
    x = torch.randn(1, 2, 256, 128).bfloat16()
    assert Packed.of(x, 4, group=128).nbytes == 2 * 256 * 64 + 2 * 2 * 2 * 128 * 2
    assert Packed.of(x, 2, granularity="token", group=128).nbytes == 2 * 256 * 32 + 2 * 2 * 256 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(1, 1, 3, 8)}, "scale has shape"),
        ({"zero": torch.ones(1, 1, 1, 8)}, "without a scale"),
        ({"codebook": torch.ones(8)}, "codebook has shape"),
        ({"outlier_index": torch.ones(1, 1, 4, 1)}, "index and a delta"),
        ({"bits": 2}, "codes are"),
        ({"granularity": "row"}, "granularity 'row'"),
    ],
)
def test_packed_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packed(**{"codes": torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "bits": 4, "dim": 8, **change})
