"""The check tells right results from wrong ones: outputs, gradients, numbers that are none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench.exact import AttentionCheck, EqualCheck, SliceCheck, distance
from saccade.bench.patterns import random_pages, random_tiles
from saccade.core import Selection
from saccade.ops import attend
from tests.core.cases import make_one_list


def inputs(n: int = 384, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, n, 16, generator=generator).to(dtype) for h in (4, 2, 2))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("pattern", ["dense", "tiles", "pages", "tokens", "one list"])
def test_right_outputs_pass_and_wrong_ones_do_not(pattern: str) -> None:
    q, k, v = inputs()
    selection: dict[str, Selection | None] = {
        "dense": None, "tiles": random_tiles(384, 4, 64, 0.4, "cpu"), "pages": random_pages(384, 2, 64, 16, 0.3, "cpu"),
        "tokens": random_pages(384, 1, 64, 1, 0.3, "cpu"),
        "one list": make_one_list(
            n_q=384, n_k=384, causal=True, block_q=64, block_k=16, batch=2, heads=2, weighted=False, seed=3
        ).shared,
    }  # fmt: skip
    chosen = selection[pattern]
    out = attend(q, k, v, chosen, impl="reference").out
    check = AttentionCheck.of(q, k, v, selection=chosen)
    error, allowed = check.judge((out,))
    assert 0 < error <= allowed < 1e-4
    assert check.judge((out * 1.001,))[0] > allowed
    out[1, -1, -1, 3] = math.nan
    assert check.judge((out,))[0] == math.inf
    if chosen is not None:
        assert check.judge((attend(q, k, v).out,))[0] > allowed, "dense attention is not the sparse result"


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_on_the_slice_are_those_of_the_whole(sparse: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    chosen = random_tiles(384, 4, 64, 0.4, "cpu") if sparse else None
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = attend(q, k, v, chosen, impl="reference").out
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    check = AttentionCheck.of(q, k, v, selection=chosen, d_out=d_out)
    error, allowed = check.judge((out.detach(), *grads))
    assert error <= allowed < 1e-4
    for wrong in range(3):
        bent = [g * 1.01 if i == wrong else g for i, g in enumerate(grads)]
        error, allowed = check.judge((out.detach(), *bent))
        assert error > allowed


def test_what_is_allowed_follows_the_dtype() -> None:
    allowed = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs(dtype=dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        error, most = AttentionCheck.of(q, k, v).judge((out,))
        assert error <= most
        allowed.append(most)
    assert allowed[0] < 1e-5 < 1e-3 < allowed[1] < 0.1


def test_slices_and_equality() -> None:
    x = torch.arange(6.0)
    check = SliceCheck(slices=lambda o: (o[0][:3],), exact=lambda: (x[:3].double(),), dtype=torch.bfloat16)
    assert check.judge((x,))[0] == 0 and check.judge((x + 0.1,))[0] > check.judge((x,))[1]
    hidden = SliceCheck(slices=lambda o: o, exact=lambda: (torch.tensor([-math.inf, 1.0]).double(),), dtype=torch.float32)
    assert hidden.judge((torch.tensor([-math.inf, 1.0]),))[0] == 0
    same = EqualCheck(slices=lambda o: o, exact=lambda: (torch.arange(4),))
    assert same.judge((torch.arange(4),)) == (0.0, 0.0) and same.judge((torch.tensor([0, 1, 2, 0]),)) == (0.25, 0.0)
    assert same.judge((torch.arange(3),)) == (1.0, 0.0) and distance(torch.zeros(2), torch.zeros(3)) == math.inf
