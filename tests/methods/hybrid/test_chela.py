"""chela: merged kernels, tiled linear attention, linear cost and the reach of the long kernel."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

import saccade
from saccade.ops.scan import scan
from saccade.parts.linear.short_long import ShortLongConv


def layer(spec: str, dim: int = 16, **sizes: int):
    torch.manual_seed(0)
    made = saccade.mixer(spec, dim=dim, heads=1, **sizes).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return made


@torch.no_grad()
def test_the_merged_kernel_equals_the_sum_of_the_branches():
    """With batch norms that have seen data, over a whole sequence, in two parts and token by token."""
    torch.manual_seed(1)
    conv = ShortLongConv(16, 50, (3, 9), batch_norm=True).double()
    for _ in range(3):
        conv(2 + torch.randn(4, 40, 16, dtype=torch.float64))
    conv.eval()
    x = torch.randn(2, 80, 16, dtype=torch.float64)
    slow = conv.by_branch(x)
    assert (conv.norms[0].running_mean.abs().max() > 1e-3) and (conv.norms[1].running_var - 1).abs().max() > 1e-3
    assert (conv(x)[0] - slow).abs().max() < 1e-12
    outs, tail, seen = [], None, 0
    for part in x.split([30, 1, 1, 47, 1], 1):
        y, tail = conv(part, tail, seen)
        seen += part.shape[1]
        outs.append(y)
    assert (torch.cat(outs, 1) - slow).abs().max() < 1e-12


@torch.no_grad()
def test_batch_norms_are_those_of_the_batch_in_training_alone():
    mixer = saccade.mixer("chela(long=20)", dim=16, heads=1)
    x = torch.randn(3, 30, 16)
    other = torch.cat([x[:1], 5 * x[1:]])
    assert not torch.allclose(mixer(x)[0][0], mixer(other)[0][0])
    mixer.eval()
    assert torch.allclose(mixer(x)[0][0], mixer(other)[0][0], atol=1e-5)
    assert torch.allclose(mixer(x)[0], mixer.naive(x), atol=1e-4)


@torch.no_grad()
def test_tiles_equal_the_quadratic_form():
    mixer, x = layer("chela(batch_norm=False)", max_length=200), torch.randn(2, 200, 16, dtype=torch.float64)
    q, k, v, _ = mixer._enter(x, mixer.conv(x)[0])
    slow = (q @ k.mT).tril() @ v
    assert (scan(q, k, v, scale=1.0, impl="chunked")[0] - slow).abs().max() < 1e-10 * slow.abs().max()
    both = layer("chela(batch_norm=False, bidirectional=True)", max_length=200)
    assert (both(x)[0] - both.naive(x)).abs().max() < 1e-10


@torch.no_grad()
def test_with_the_identity_as_kernel_it_is_gated_linear_attention():
    mixer, x = layer("chela(long=0, short=(1,), batch_norm=False)"), torch.randn(2, 30, 16, dtype=torch.float64)
    mixer.conv.short[0].fill_(1)
    unit, m = mixer.gated, F.silu(x)
    u, z, r, c = unit.in_proj(m).split(unit.splits, -1)
    q, k = (F.silu(z) * unit.scales[i] + unit.shifts[i] for i in range(2))
    o = (q @ k.mT).tril() @ F.silu(unit.v_proj(x))
    o = mixer.norm(o)
    h = F.silu(c + unit.h_proj(F.silu(r) * o))
    assert (x + mixer(x)[0] - (x + u.sigmoid() * (h - x))).abs().max() < 1e-12


@torch.no_grad()
def test_time_is_linear_in_the_length():
    mixer = saccade.mixer("chela(batch_norm=False, long=8192)", dim=16, heads=1)

    def fastest(n: int) -> float:
        x, times = torch.randn(1, n, 16), []
        for _ in range(3):
            begin = time.perf_counter()
            mixer(x, keep=False)
            times.append(time.perf_counter() - begin)
        return min(times)

    fastest(512)
    assert fastest(8192) < 10 * fastest(2048)


def late_answer(long: int) -> float:
    """Loss of a sign shown at the first token and asked for at the 40th, through the convolution alone: attention is shut."""
    torch.manual_seed(2)
    mixer = saccade.mixer(f"chela(long={long}, batch_norm=False)", dim=16, heads=1).double()
    head = torch.nn.Linear(16, 1).double()
    mixer.gated.h_proj.weight.data.zero_()
    trained = [*mixer.conv.parameters(), *mixer.gated.in_proj.parameters(), *head.parameters()]
    optimiser, loss = torch.optim.Adam(trained, lr=0.03), torch.zeros(())
    for _ in range(25):
        sign = torch.randint(2, (16,)).double()
        x = 0.1 * torch.randn(16, 40, 16, dtype=torch.float64)
        x[:, 0] += (2 * sign - 1)[:, None]
        loss = F.binary_cross_entropy_with_logits(head(mixer(x, keep=False)[0][:, -1])[:, 0], sign)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


def test_only_the_long_kernel_reaches_far_without_attention():
    assert late_answer(40) < 0.2
    assert late_answer(0) > 0.5


@pytest.mark.parametrize("fields", ["long=-1", "long=0, short=()", "short=(0,)", "expand=0", "narrow=0"])
def test_wrong_fields_are_refused(fields: str):
    with pytest.raises(ValueError, match="give at least"):
        saccade.mixer(f"chela({fields})", dim=16, heads=1)
