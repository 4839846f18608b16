"""short_conv against sums in float64: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import saccade
from saccade.ops.conv import short_conv
from saccade.parts.linear import ShortConv
from tests.ops.memory import watched
from tests.ops.poison import poison

pytest.importorskip("triton")

from saccade.ops.conv.triton import launch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def same_numbers_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison(monkeypatch)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of four tokens and eight channels, so that a few tokens are cut as long sequences are."""

    def cut(x: Tensor, width: int) -> launch.Tiles:
        return launch.Tiles(4, 2, 8, -(-x.shape[1] // 4), -(-x.shape[2] // 8))

    monkeypatch.setattr(launch, "tiles", cut)


def inputs(n: int, width: int, *, b: int = 1, c: int = 11, dtype: torch.dtype = torch.float32, bias: bool = True, tail: bool = True):
    """x, weight, bias and tail, with room around each that is not theirs."""
    x = torch.randn(b, n + 2, c + 3)[:, 1:-1, 2:-1].to(DEVICE, dtype)
    weight, offset = torch.randn(c, width).to(DEVICE), torch.randn(c).to(DEVICE)
    before = torch.randn(b, width + 1, c + 1)[:, 1:-1, 1:].to(DEVICE, dtype)
    return [x, weight, offset if bias else None, before if tail else None]


def exact(given: list[Tensor | None], activation: str | None, dy: Tensor | None = None) -> list[Tensor]:
    """y and, given dy, the gradients of what is there: written out a second way, in float64."""
    x, weight, bias, tail = (None if t is None else t.detach().double().requires_grad_() for t in given)
    assert x is not None and weight is not None
    width, y = weight.shape[1], []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0]) if bias is None else bias
        for back in range(width):
            if t - back >= 0:
                total = total + weight[:, width - 1 - back] * x[:, t - back]
            elif tail is not None:
                total = total + weight[:, width - 1 - back] * tail[:, width - 1 + t - back]
        y.append(total / (1 + torch.exp(-total)) if activation else total)
    out = torch.stack(y, 1)
    there = [t for t in (x, weight, bias, tail) if t is not None]
    grads = [] if dy is None else torch.autograd.grad(out, there, dy.double(), allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(there, grads, strict=False))]


def ours(given: list[Tensor | None], activation: str | None, dy: Tensor | None = None, impl: Any = "triton") -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_(dy is not None) for t in given]
    x, weight, bias, tail = leaves
    assert x is not None and weight is not None
    out = short_conv(x, weight, bias, tail=tail, activation=activation, impl=impl)
    there = [t for t in leaves if t is not None]
    grads = [] if dy is None else torch.autograd.grad(out, there, dy, allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(there, grads, strict=False))]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


CASES = [  # width, tokens, sequences, activation, bias, tail
    (1, 5, 1, "silu", True, False),
    (2, 7, 2, None, False, True),
    (3, 1, 1, "silu", True, True),
    (4, 9, 1, "silu", True, True),
    (4, 8, 2, "silu", False, False),
    (5, 3, 1, None, True, True),
    (8, 6, 1, "silu", True, True),
]


@pytest.mark.parametrize(("width", "n", "b", "activation", "bias", "tail"), CASES)
def test_the_kernels_compute_the_sums_and_their_gradients(
    width: int, n: int, b: int, activation: str | None, bias: bool, tail: bool, small: None
) -> None:
    """Tokens and channels that fill no tile, inputs among others in memory, a gradient that lies channels first."""
    given = inputs(n, width, b=b, c=11 if b == 1 else 7, bias=bias, tail=tail and width > 1)
    dy = torch.randn(b, 11 if b == 1 else 7, n, device=DEVICE).mT
    want = exact(given, activation, dy)
    for got, right in zip(ours(given, activation, dy), want, strict=True):
        assert got.dtype == torch.float32 and error(got, right) <= 1e-6
    for impl in ("reference", "conv1d"):
        assert all(error(got, right) <= 1e-6 for got, right in zip(ours(given, activation, dy, impl), want, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """No worse than torch's own convolution in that dtype, although weights stay in float32; the tiles are those of real calls."""
    given = inputs(19, 4, dtype=dtype)
    dy = torch.randn(1, 19, 11, device=DEVICE).to(dtype)
    half = [None if t is None else t.to(dtype) for t in given]
    # the interpreter cuts bfloat16 off where a GPU rounds
    allowed = 1.0 if CUDA or dtype != torch.bfloat16 else 4.0
    got, theirs = ours(given, "silu", dy), ours(half, "silu", dy, impl="conv1d")
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32, dtype]
    for one, other, right in zip(got, theirs, exact(given, "silu", dy), strict=True):
        assert error(one, right) <= allowed * error(other, right)


@pytest.mark.parametrize("impl", ("reference", "conv1d", "triton", "auto"))
@pytest.mark.parametrize("n", (1, 3))
def test_weights_of_more_bits_than_the_inputs(impl: Any, n: int) -> None:
    """The dtype is that of x, the sums are not."""
    x, weight, *_ = inputs(n, 2, c=7)
    assert x is not None and weight is not None
    y = short_conv(x.half(), weight, activation="silu", impl=impl)
    assert y.dtype == torch.float16 and error(y, exact([x.half(), weight, None, None], "silu")[0]) <= 5e-4


@pytest.mark.parametrize("layout", ("channels first", "sequences inside", "one for all"))
def test_layouts_give_the_same_bits(layout: str, small: None) -> None:
    x, weight, *_ = inputs(6, 3, b=2, c=9)
    assert x is not None and weight is not None
    if layout == "one for all":
        x = x[:1].expand(2, -1, -1)
    same = {"channels first": x.mT.contiguous().mT, "sequences inside": x.transpose(0, 1).contiguous().transpose(0, 1)}.get(layout, x)
    y = short_conv(same, weight, activation="silu", impl="triton")
    assert torch.equal(y, short_conv(x.contiguous(), weight, activation="silu", impl="triton")) and y.is_contiguous()


def test_only_the_gradients_that_are_wanted(small: None) -> None:
    """Frozen weights take no sums, and two runs agree to the bit."""
    x, weight, bias, tail = inputs(5, 4, c=7)
    assert x is not None and weight is not None and bias is not None and tail is not None
    dy = torch.randn(1, 5, 7, device=DEVICE)
    _, dx, dweight, dbias, dtail = ours([x, weight, bias, tail], "silu", dy)
    alone = x.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(short_conv(alone, weight, bias, tail=tail, activation="silu", impl="triton"), alone, dy)[0], dx)
    again = [t.detach().requires_grad_() for t in (weight, bias)]
    found = torch.autograd.grad(short_conv(x, *again, tail=tail, activation="silu", impl="triton"), again, dy)
    assert torch.equal(found[0], dweight) and torch.equal(found[1], dbias) and dtail.isfinite().all()
    y = short_conv(x, weight, again[1], tail=tail, activation="silu", impl="triton")
    assert torch.equal(torch.autograd.grad(y, again[1], dy)[0], dbias)


def test_the_future_and_other_channels_stay_out(small: None) -> None:
    """What is not a number reaches the tokens that read it and, backward, the inputs that they read; nothing else."""
    x, weight, bias, _ = inputs(11, 3, c=7)
    assert x is not None and weight is not None
    x, dy = x.clone(), torch.randn(1, 11, 7, device=DEVICE)
    x[0, 6, 4] = math.nan
    y, dx, *_ = ours([x, weight, bias, None], "silu", dy)
    hit, back = torch.zeros(11, 7, dtype=torch.bool, device=DEVICE), torch.zeros(11, 7, dtype=torch.bool, device=DEVICE)
    hit[6:9, 4], back[4:9, 4] = True, True
    assert torch.equal(y[0].isnan(), hit) and torch.equal(dx[0].isnan(), back)


@pytest.mark.skipif(CUDA, reason="kernels are watched in the interpreter")
@pytest.mark.parametrize("tail", (False, True))
def test_the_kernels_stay_inside(tail: bool, small: None) -> None:
    given = inputs(6, 4, b=1 + tail, c=7, tail=tail)
    # storages that end where the tensors do
    given = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in given]
    with watched() as seen:
        found = ours(given, "silu", torch.randn(1 + tail, 6, 7))
    assert len(seen) > 10 and all(t.isfinite().all() for t in found)


def test_long_sequences_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 132 multiprocessors: one sequence of 128K has as many programs as sixteen of 8K, and short ones are cut finely."""
    monkeypatch.setattr(launch, "multiprocessors", lambda x: 132)

    def programs(batch: int, n: int, channels: int) -> tuple[int, int]:
        t = launch.tiles(torch.empty(batch, n, channels, device="meta"), 4)
        assert t.chunks * t.length >= n > (t.chunks - 1) * t.length and t.blocks * t.block >= channels and t.length % t.step == 0
        return batch * t.chunks * t.blocks, t.length

    assert programs(1, 131072, 6144) == programs(16, 8192, 6144) == (24576, 256)
    assert programs(1, 131072, 2048) == (16384, 128) and programs(1, 512, 6144) == (1536, 16) and programs(1, 1, 6144) == (48, 4)


def test_compiles_into_one_graph() -> None:
    x, weight, bias, tail = inputs(5, 3)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, tail) if t is not None]

    def run(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
        return short_conv(x, weight, bias, tail=tail, activation="silu", impl="triton").square().sum()

    want = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager" if not CUDA else "inductor")
    for got, right in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        assert error(got, right.double()) <= 1e-6


def test_one_token_is_one_kernel_where_nobody_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, tail = inputs(1, 4)
    assert x is not None and weight is not None
    monkeypatch.setattr("saccade.ops.conv.runs_on", lambda x: True)
    y = short_conv(x, weight, bias, tail=tail, activation="silu")
    assert saccade.last_run().impl == "triton" and error(y, exact([x, weight, bias, tail], "silu")[0]) <= 1e-6
    y = short_conv(x, weight.requires_grad_(), bias, tail=tail, activation="silu")
    assert saccade.last_run().impl == "step" and error(y, exact([x, weight, bias, tail], "silu")[0]) <= 1e-6


@pytest.mark.gpu
def test_more_than_two_thousand_million_numbers() -> None:
    """The last tokens of the last sequence are what they are alone, forward and backward."""
    if not CUDA or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("no GPU with 60 GiB")
    x = torch.randn(2, 600_000, 2048, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(2048, 4, device=DEVICE, dtype=torch.bfloat16)
    y = short_conv(x, weight, activation="silu")
    assert saccade.last_run().impl == "triton"
    y.backward(y.detach())
    alone = x.detach()[1:, -40:].clone().requires_grad_()
    few = short_conv(alone, weight, activation="silu")
    few.backward(few.detach())
    assert x.grad is not None and alone.grad is not None
    assert torch.equal(y[1:, -30:], few[:, -30:]) and torch.equal(x.grad[1:, -30:], alone.grad[:, -30:])


def test_what_ran_and_what_is_refused() -> None:
    unknown: Any = "fast"
    x, weight, bias, tail = (torch.randn(2, 5, 6), torch.randn(6, 3), torch.randn(6), torch.randn(2, 2, 6))
    short_conv(x, weight, bias, tail=tail)
    run = saccade.last_run()
    assert (run.op, run.impl, run.n_q, run.heads) == ("short_conv", "conv1d", 5, 6)
    short_conv(x[:, :1], weight)
    assert saccade.last_run().impl == "step"
    assert short_conv(x[:, :0], weight, tail=tail).shape == (2, 0, 6)
    for message, call in {
        "x has shape": lambda: short_conv(x[0], weight),
        r"give \(6, width\)": lambda: short_conv(x, weight.mT),
        r"give \(6,\)": lambda: short_conv(x, weight, bias[:2]),
        r"give \(2, 2, 6\)": lambda: short_conv(x, weight, tail=tail[:, :1]),
        "'silu' or None": lambda: short_conv(x, weight, activation="relu"),
        "'fast' is not one of": lambda: short_conv(x, weight, impl=unknown),
        "float32, bfloat16 and float16": lambda: short_conv(x.to(DEVICE).double(), weight.to(DEVICE), impl="triton"),
        "widths up to 16": lambda: short_conv(x.to(DEVICE), torch.zeros(6, 17, device=DEVICE), impl="triton"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        short_conv(x, weight.long())


@pytest.mark.parametrize("n", (1, 2, 7))
def test_the_layer_is_what_it_was(n: int) -> None:
    """In float64 to the bit, and under autocast in its dtype, one token included; the kernel gives the layer's gradients too."""
    layer = ShortConv(6, 4, bias=True).to(DEVICE)
    x, tail = torch.randn(2, n, 6, device=DEVICE), torch.randn(2, 3, 6, device=DEVICE)
    joined = torch.cat([tail, x], 1).double()
    right = F.silu(F.conv1d(joined.mT, layer.weight.double().unsqueeze(1), torch.zeros(6, device=DEVICE).double(), groups=6).mT)
    wide = ShortConv(6, 4, bias=True).double().to(DEVICE)
    wide.load_state_dict(layer.state_dict())
    y, kept = wide(x.double(), tail.double())
    assert torch.allclose(y, right, rtol=0, atol=1e-14) and torch.equal(kept, joined[:, n:])
    fresh, _ = wide(x.double())
    assert torch.allclose(fresh, wide(x.double(), torch.zeros_like(tail))[0], rtol=0, atol=1e-14)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, kept = layer(x, tail)
        assert y.dtype == torch.bfloat16 and kept.dtype == torch.float32 and error(y, right) <= 0.02
        y, kept = layer(x.bfloat16(), tail)
        assert y.dtype == kept.dtype == torch.bfloat16 and error(y, right) <= 0.02


def test_a_layer_goes_on_where_the_kernel_stopped(small: None) -> None:
    """Pieces with the tail handed on are the whole, gradients through the tail included; what is padding stays out of it."""
    layer = ShortConv(7, 4).to(DEVICE)
    layer.impl = "triton"
    x = torch.randn(1, 7, 7, device=DEVICE)
    whole = x.clone().requires_grad_()
    y, tail = layer(whole)
    want = torch.autograd.grad(y.square().sum(), whole)[0]
    cut = x.clone().requires_grad_()
    first, kept = layer(cut[:, :5])
    second, last = layer(cut[:, 5:], kept)
    assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(last, tail)
    got = torch.autograd.grad(first.square().sum() + second.square().sum(), cut)[0]
    assert error(got, want.double()) <= 1e-6
    _, kept = layer(x, lengths=torch.tensor([2], device=DEVICE))
    assert torch.equal(kept[0], F.pad(x[0, :2], (0, 0, 1, 0)))
