"""lightning-attention: blocks against the masked form, slopes, and time that grows with the length alone."""

from __future__ import annotations

import time

import pytest
import torch

import saccade
from saccade.ops.scan import scan
from saccade.parts.linear.slopes import alibi_slopes, lightning_slopes


def masked_form(q, k, v, slopes):
    """The N x N form, entry by entry."""
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    weight = torch.where(i >= j, torch.exp(-slopes[:, None, None] * (i - j)), 0.0)
    return (q @ k.mT * weight) @ v


@pytest.mark.parametrize("n", [1, 63, 64, 100, 257])
def test_blocks_equal_the_masked_form_and_so_do_the_gradients(n: int):
    torch.manual_seed(0)
    slopes = torch.tensor([0.0, 0.003, 0.25, 3.0], dtype=torch.float64)
    results = []
    for run in (masked_form, lambda q, k, v, s: scan(q, k, v, log_decay=-s, scale=1.0)[0]):
        torch.manual_seed(n)
        q, k, v = (torch.randn(2, 4, n, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
        out = run(q, k, v, slopes)
        results.append((out, *torch.autograd.grad((out * torch.linspace(-1, 1, n)[:, None]).sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-10 * (1 + a.abs().max())


def test_state_after_a_prompt_and_steps_is_that_of_one_pass():
    layer = saccade.mixer("lightning-attention", dim=64, heads=4, layers=4).double()
    x = torch.randn(2, 140, 64, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x[:, :130])
        for t in range(130, 140):
            _, state = layer(x[:, t : t + 1], state)
        assert (state.values["s"] - layer(x)[1].values["s"]).abs().max() < 1e-11


def test_slopes_follow_both_formulas():
    assert torch.allclose(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    assert alibi_slopes(6).unique().numel() == 6
    first, last = (lightning_slopes(8, layer, 24) for layer in (0, 23))
    assert torch.allclose(first, alibi_slopes(8) * (1 + 1e-5)) and last.max() < 1e-4  # the last layer keeps all
    linear = lightning_slopes(8, 6, 24, "linear")
    assert torch.allclose(linear, torch.arange(1.0, 9.0) * 0.75)
    assert lightning_slopes(8, 6, 24, "none").max() == 0
    with pytest.raises(ValueError, match="slopes 'alibbi' are not known"):
        saccade.mixer("lightning-attention(slopes='alibbi')", dim=64, heads=4)


def test_layers_forget_by_their_depth():
    torch.manual_seed(1)
    x = torch.randn(1, 60, 64, dtype=torch.float64)
    reach = []  # of what the head of the steepest slope holds, the share that is older than 30 tokens
    for layer in (0, 3):
        mixer = saccade.mixer("lightning-attention", dim=64, heads=4, layer=layer, layers=4).double()
        states = [mixer(part)[1].values["s"].detach() for part in (x, x[:, 30:])]
        reach.append(float((states[0] - states[1])[:, 0].norm() / states[0][:, 0].norm()))
    assert reach[0] < 0.05 < 0.3 < reach[1]


def test_the_norm_has_no_weights_and_covers_all_heads():
    layer = saccade.mixer("lightning-attention", dim=64, heads=4)
    assert not list(layer.normaliser.parameters())
    out = layer.normaliser.after(torch.randn(2, 4, 5, 16), layer.whole(torch.randn(2, 5, 64)), None)
    assert torch.allclose(out.square().mean((1, 3)), torch.ones(2, 5), atol=1e-4)


@pytest.mark.slow
def test_time_grows_with_the_length_where_softmax_grows_with_its_square():
    def seconds(run, n: int) -> float:
        q, k, v = (torch.randn(1, 8, n, 64) for _ in range(3))
        best = float("inf")
        for _ in range(6):
            begin = time.perf_counter()
            run(q, k, v)
            best = min(best, time.perf_counter() - begin)
        return best

    def linear(q, k, v):
        return scan(q, k, v, log_decay=-alibi_slopes(8), scale=1.0)

    def softmax(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert seconds(linear, 16384) / seconds(linear, 4096) < 6 < 10 < seconds(softmax, 16384) / seconds(softmax, 4096)
