"""linformer: softmax attention as its limit, projections along the sequence, sharing, and no generation."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.core import MixerState
from saccade.methods import build_mixer
from saccade.methods.linear.linformer import share_projections


def layer(spec: str, seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, "max_length": 64, **sizes}).double()


def tokens(n: int = 64) -> torch.Tensor:
    return torch.randn(2, n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def full(made, x):
    """Bidirectional softmax attention with the layer's weights."""
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (made.q_proj, made.k_proj, made.v_proj))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return made.o_proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_identity_projections_are_full_attention():
    for sharing in ("none", "heads", "kv"):
        made = layer(f"linformer(k=64, sharing='{sharing}')", kv_heads=2)
        for weight in (made.e, made.f):
            if weight is not None:
                weight.copy_(torch.eye(64).expand_as(weight))
        assert (made(tokens())[0] - full(made, tokens())).abs().max() < 1e-13
    for way in ("mean", "max"):
        made = layer(f"linformer(k=64, projection='{way}')")
        assert (made(tokens())[0] - full(made, tokens())).abs().max() < 1e-13


@torch.no_grad()
def test_keys_may_change_places_only_together_with_the_columns():
    made, x = layer("linformer(k=8)"), tokens()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    y = made(x)[0]
    assert (made(x[:, order])[0] - y[:, order]).abs().max() > 1e-3
    for weight in (made.e, made.f):
        weight.copy_(weight[:, :, order])
    assert (made(x[:, order])[0] - y[:, order]).abs().max() < 1e-13


@torch.no_grad()
def test_more_rows_come_closer_to_full_attention_on_smooth_sequences():
    """Keys and values that change slowly along the sequence have few directions in time: windows of means approach full attention."""
    time = torch.arange(64, dtype=torch.float64)
    waves = torch.stack([torch.cos(time * w * torch.pi / 64) for w in range(4)], -1)
    x = (waves @ torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).unsqueeze(0)
    errors = []
    for k in (2, 4, 8, 16, 32, 64):
        made = layer(f"linformer(k={k}, projection='mean')")
        errors.append(float((made(x)[0] - full(made, x)).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < errors[-2]


@torch.no_grad()
def test_random_projections_keep_products_better_with_more_rows():
    """The guarantee behind it: (E K)^T-products differ from full ones by a relative error that falls as k^-1/2."""
    torch.manual_seed(4)
    a, b = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    errors = []
    for k in (16, 256, 4096):
        e = layer(f"linformer(k={k})", seed=k).e[0]
        errors.append(float(((e @ a) @ (e @ b) - a @ b).abs() / (a.norm() * b.norm())))
    assert all(error < 4 * k**-0.5 for error, k in zip(errors, (16, 256, 4096), strict=True))
    assert abs(float(layer("linformer(k=256)").e.std()) - 256**-0.5) < 0.002


@torch.no_grad()
def test_a_shorter_sequence_takes_the_first_columns_and_padding_adds_nothing():
    for spec in ("linformer(k=8)", "linformer(k=8, projection='conv')"):
        made, x = layer(spec), tokens(40)
        y = made(x)[0]
        padded = torch.cat([x, torch.full((2, 9, 32), 7.0, dtype=torch.float64)], dim=1)
        valid = torch.arange(49).expand(2, -1) < 40
        assert (made(padded, valid=valid)[0][:, :40] - y).abs().max() < 1e-13
    made = layer("linformer(k=8)")
    y = made(tokens(40))[0]
    made.e[:, :, 40:] = 99.0
    made.f[:, :, 40:] = 99.0
    assert torch.equal(made(tokens(40))[0], y)


def test_numbers_of_weights_follow_the_sharing():
    count = {name: sum(x.numel() for x in (m.e, m.f) if x is not None) for name, m in (
        (name, layer(f"linformer(k=8, sharing='{name}')")) for name in ("none", "heads", "kv")
    )}  # fmt: skip
    assert count == {"none": 2 * 4 * 8 * 64, "heads": 2 * 8 * 64, "kv": 8 * 64}
    stack = torch.nn.ModuleList(layer("linformer(k=8, sharing='kv')", seed=i, layer=i, layers=3) for i in range(3))
    before = sum(x.numel() for x in stack.parameters())
    share_projections(stack)
    assert before - sum(x.numel() for x in stack.parameters()) == 2 * 8 * 64
    sum(mixer(tokens())[0].sum() for mixer in stack).backward()
    assert stack[2].e is stack[0].e and stack[0].e.grad is not None
    with pytest.raises(ValueError, match="sharing='kv'"):
        share_projections([layer("linformer(k=8)")])
    with pytest.raises(ValueError, match="give all the same k"):
        share_projections([layer("linformer(k=8, sharing='kv')"), layer("linformer(k=9, sharing='kv')")])


def test_rows_may_fall_towards_the_top():
    method = build_mixer("linformer(k=64, top=16)")
    assert [method.rows(i, 4) for i in range(4)] == [64, 48, 32, 16] and method.rows(0, 1) == 64
    assert layer("linformer(k=64, top=16)", layer=3, layers=4).e.shape == (1, 16, 64)


def test_generation_is_refused():
    made = layer("linformer(k=8)")
    assert made.causality == "bidirectional" and made(tokens())[1] is None
    with pytest.raises(ValueError, match="no state"):
        made(tokens(1), MixerState(torch.zeros(2, dtype=torch.int64), {}))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="give max_length"):
        saccade.mixer("linformer", dim=32, heads=4)
    with pytest.raises(ValueError, match="70 tokens are more than the 64"):
        layer("linformer(k=8)")(tokens(70))
    for spec, message in (("k=0", "at least 1 row"), ("sharing='all'", "is not 'none'"), ("projection='sum'", "is not 'dense'")):
        with pytest.raises(ValueError, match=message):
            layer(f"linformer({spec})")
