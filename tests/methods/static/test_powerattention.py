"""PowerAttention (powerattention, 2503.03588): reach over blocks, kept blocks, and the mask itself."""

from __future__ import annotations

import pytest
import torch
from tests.methods.prefill.planted import context
from tests.methods.static.grids import masked_dense, qkv

import saccade
from saccade.methods import build
from saccade.methods.static.powerattention import PowerAttention
from saccade.parts.static import Pattern, pow2, window


def hops(pattern: Pattern, blocks: int) -> int:
    """Layers until the last block has heard of every block."""
    i = torch.arange(blocks)
    edges = (pattern.allow(i.view(1, -1, 1), i.view(1, 1, -1))[0] & (i <= i.unsqueeze(1))).double()
    reached, layers = torch.zeros(blocks, dtype=torch.double), 0
    reached[-1] = 1
    while not bool((reached > 0).all()):
        reached, layers = ((reached @ edges) > 0).double(), layers + 1
    return layers


def test_hops_over_blocks() -> None:
    i = torch.arange(70)
    assert pow2().allow(i[-1:].view(1, 1), i.view(1, -1))[0].nonzero().flatten().tolist() == [5, 37, 53, 61, 65, 67, 68, 69]
    assert hops(window(5) | pow2(), 128) == 6 and hops(pow2(), 128) == 7
    # windows of as many blocks a row: 5 + 4 powers + the sink, and 5 + 6 + 1
    assert hops(window(10), 128) == 15
    assert hops(window(5) | pow2(), 512) == 8 and hops(window(12), 512) == 47


@pytest.mark.parametrize("n", [97, 160])
@pytest.mark.parametrize("n_q", [97, 30])
def test_the_mask_is_the_paper_s(n: int, n_q: int) -> None:
    method = PowerAttention(block=4, window=3, sinks=1)
    q, k, v = qkv(n)
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
    distance = i // 4 - j // 4
    pairs = (j <= i) & ((distance < 3) | ((distance & (distance - 1)) == 0) | (j < 4))
    exact = masked_dense(q, k, v, pairs)[:, :, -n_q:]
    part = q[:, :, -n_q:]
    ctx = context(part, k, v)
    assert torch.equal(method.select(ctx, part, k, v).dense_mask()[0, 0], pairs[-n_q:])
    assert (method.attend(ctx, part, k, v) - exact).abs().max() < 1e-12


def test_kept_blocks_grow_by_one_per_doubling() -> None:
    method = PowerAttention(block=16)
    counts = []
    for n in (1024, 2048, 4096, 8192):
        q, k, v = (torch.zeros(1, 1, n, 4) for _ in range(3))
        selection = method.select(context(q, k, v), q, k, v)
        counts.append(int(selection.start_counts.max()))
    # 5 local, the powers 8 ... n / 32, the sink
    assert counts == [5 + 3 + 1, 5 + 4 + 1, 5 + 5 + 1, 5 + 6 + 1]


def test_defaults_read_ten_blocks_at_32k() -> None:
    q, k, v = (torch.zeros(1, 1, 1 << 15, 1) for _ in range(3))
    selection = PowerAttention().select(context(q, k, v), q, k, v)
    blocks = selection.start_counts * selection.block_k / 256
    assert 9 <= float(blocks.max()) <= 10 + 1 and selection.density() < 0.16


def test_gradients_arrive_with_the_layers_of_the_graph() -> None:
    """Without the sink, position 0 is felt at the end of 32 blocks after 5 layers and not before."""
    generator = torch.Generator().manual_seed(0)
    for layers, felt in ((4, False), (5, True)):
        x = start = torch.randn(1, 1, 128, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(layers):
            wq, wk, wv = 0.2 * torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
            x = x + saccade.attention(x @ wq, x @ wk, x @ wv, method="powerattention(block=4, window=1, sinks=0)")
        (gradient,) = torch.autograd.grad(x[0, 0, -1].sum(), start)
        assert bool(gradient[0, 0, 0].abs().sum() > 0) == felt


def test_hybrid_layers_are_dense() -> None:
    q, k, v = qkv(120)
    dense = masked_dense(q, k, v, torch.ones(120, 120, dtype=torch.bool).tril())
    method = PowerAttention(block=4, window=1, sinks=0, dense_of_7=2)
    same = [(method.attend(context(q, k, v, layer=i), q, k, v) - dense).abs().max() < 1e-12 for i in range(8)]
    assert [bool(x) for x in same] == [True, True, False, False, False, False, False, True]


def test_fields_are_checked() -> None:
    for spec, message in (
        ("powerattention(block=0)", "block=0"), ("powerattention(sinks=-1)", "sinks=-1"), ("powerattention(dense_of_7=8)", "at most 7"),
    ):
        with pytest.raises(ValueError, match=message):
            build(spec)
