"""The softmax mixer: a Llama's attention layer, windows, grouped heads, and its state."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import saccade


def test_it_is_a_llama_attention_layer():
    """With a Llama layer's weights, under their own names, it gives that layer's output."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="eager", num_hidden_layers=1
    )
    llama = LlamaAttention(config, 0).double()
    layer = saccade.mixer("softmax", dim=64, heads=4, kv_heads=2).double()
    layer.load_state_dict(llama.state_dict())
    x = torch.randn(2, 30, 64, dtype=torch.float64)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(30)[None])
    mask = torch.full((30, 30), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected = llama(x, position_embeddings=angles, attention_mask=mask)[0]
    # the model's own angles are float32
    assert (layer(x)[0] - expected).abs().max() < 1e-6


def test_a_window_as_long_as_the_sequence_is_no_window_and_a_short_one_forgets():
    torch.manual_seed(1)
    x = torch.randn(2, 50, 64, dtype=torch.float64)
    full = saccade.mixer("softmax", dim=64, heads=4).double()
    outs = {}
    for window in (8, 49, 50, 1000):
        layer = saccade.mixer(f"softmax(window={window})", dim=64, heads=4).double()
        layer.load_state_dict(full.state_dict())
        outs[window] = layer(x)[0]
    y = full(x)[0]
    assert all((outs[window] - y).abs().max() < 1e-12 for window in (50, 1000))
    assert (outs[49] - y)[:, :49].abs().max() < 1e-12 < (outs[49] - y)[:, 49].abs().max()
    other = x.clone()
    other[:, 20] += 1
    layer = saccade.mixer("softmax(window=8)", dim=64, heads=4).double()
    change = (layer(other)[0] - layer(x)[0]).abs().amax((0, 2))
    assert change[20:28].min() > 0 and change[:20].max() == 0 and change[28:].max() < 1e-12


def test_sinks_stay_visible():
    torch.manual_seed(2)
    x = torch.randn(1, 60, 64, dtype=torch.float64)
    layer = saccade.mixer("softmax(window=8, sinks=2)", dim=64, heads=4).double()
    other = x.clone()
    other[:, 1] += 1
    assert (layer(other)[0] - layer(x)[0]).abs().amax((0, 2))[1:].min() > 0
    other = x.clone()
    other[:, 2] += 1
    assert (layer(other)[0] - layer(x)[0]).abs().amax((0, 2))[10:].max() < 1e-12


def test_a_window_s_state_has_a_fixed_size_and_a_full_one_grows():
    windowed, full = saccade.mixer("softmax(window=16, sinks=4)", dim=64, heads=4), saccade.mixer("softmax", dim=64, heads=4)
    sizes = [[layer(torch.randn(1, n, 64))[1].nbytes for n in (8, 64, 512)] for layer in (windowed, full)]
    assert len(set(sizes[0])) == 1 and sizes[0][0] == 2 * 4 * (15 + 4) * 64 + 8
    assert sizes[1][0] < sizes[1][1] < sizes[1][2]


def test_positions_may_be_given():
    torch.manual_seed(3)
    x = torch.randn(1, 20, 64, dtype=torch.float64)
    layer = saccade.mixer("softmax", dim=64, heads=4).double()
    y = layer(x)[0]
    assert (layer(x, positions=torch.arange(100, 120)[None])[0] - y).abs().max() < 1e-10  # distances alone count
    assert (layer(x, positions=2 * torch.arange(20)[None])[0] - y).abs().max() > 1e-6


def test_wrong_fields_are_refused():
    for spec in ("softmax(window=0)", "softmax(sinks=4)", "softmax(theta=0.0)"):
        with pytest.raises(ValueError, match="give a"):
            saccade.mixer(spec, dim=64, heads=4)
    with pytest.raises(ValueError, match="even head_dim"):
        saccade.mixer("softmax", dim=60, heads=4)
