"""The kernels of attend_low_bit against the oracle: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import Selection
from saccade.ops.attend import attend_low_bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(block_q=32, block_k=32)


def draw(
    n_q: int, n_k: int, *, batch: int = 1, heads: int = 2, kv_heads: int = 1, dim: int = 32, dim_v: int | None = None,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, n_q, dim), (kv_heads, n_k, dim), (kv_heads, n_k, dim_v or dim))
    q, k, v = (torch.randn(batch, *shape, generator=g) for shape in shapes)
    k = k + torch.randn(dim, generator=g)  # keys have something in common
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def tiles(
    n_q: int, n_k: int, block_q: int, block_k: int, *, heads: int = 1, batch: int = 1, share: float = 0.4, causal: bool = True
) -> Selection:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(batch, heads, math.ceil(n_q / block_q), math.ceil(n_k / block_k), generator=g) < share
    return Selection.from_block_mask(mask.to(DEVICE), block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)


def singles(n_q: int, n_k: int, block_q: int, *, block_k: int = 1, heads: int = 1, share: float = 0.15) -> Selection:
    mask = torch.rand(1, heads, math.ceil(n_q / block_q), n_k, generator=torch.Generator().manual_seed(2)) < share
    return Selection.from_token_mask(mask.to(DEVICE), block_q=block_q, n_q=n_q, block_k=block_k)


def mixed() -> Selection:
    """Unaligned tiles and weighted single keys."""
    g = torch.Generator().manual_seed(3)
    return Selection.from_parts(
        n_q=64, n_k=96, block_q=32, block_k=32, starts=torch.tensor([3, 64]).expand(1, 1, 2, 2).to(DEVICE),
        tokens=torch.randint(0, 96, (1, 1, 2, 7), generator=g).to(DEVICE), log_weight=torch.randn(1, 1, 2, 7, generator=g).to(DEVICE),
    )  # fmt: skip


def check(inputs: tuple[Tensor, Tensor, Tensor], selection: Selection | None = None, **options) -> None:
    """Kernel and oracle round the same numbers: they differ by the rounding of weights and results to the values' dtype."""
    options = {"return_lse": True, **SMALL, **options}
    want = attend_low_bit(*inputs, selection, impl="reference", **options)
    got = attend_low_bit(*inputs, selection, impl="triton", **options)
    assert saccade.last_run().impl == "triton"
    assert want.lse is not None and got.lse is not None
    seen = want.lse > -torch.inf
    assert torch.equal(seen, got.lse > -torch.inf) and got.out.dtype == inputs[0].dtype
    size, error = float(inputs[2].abs().max()), (got.out.double() - want.out.double()).abs()
    # a float8 product's factors on the border between two codes may go to either on a GPU, which scales them in another order
    rough = DEVICE.startswith("cuda") and options.get("qk") == "fp8"
    gap = ((got.lse - want.lse)[seen].abs() / (1 + want.lse[seen].abs())).double()
    assert bool(gap.le(2**-6 if rough else 2e-5).all()) and float(gap.sum()) <= 1e-4 * gap.numel()
    kinds = {inputs[2].dtype, torch.float16} if options.get("pv") == "fp16" else {inputs[2].dtype}
    allowed = 2 * size * sum(torch.finfo(kind).eps if kind != torch.float32 else 1e-6 for kind in kinds)
    if options.get("pv") != "fp8" and not rough:
        assert float(error.max()) <= allowed + 1e-6
        return
    # a weight on the border between two float8 numbers may go to either: 2^-3 of it, and a few do
    assert float(error.norm() / want.out.double().norm()) < 5e-3 + allowed
    assert float(error.max()) <= size / 8


@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("pv", ["same", "fp8"])
@pytest.mark.parametrize(("n_q", "n_k", "causal"), [(40, 70, True), (1, 33, False), (40, 24, True)])
def test_dense(qk: str, pv: str, n_q: int, n_k: int, causal: bool) -> None:
    check(draw(n_q, n_k), qk=qk, pv=pv, causal=causal)


@pytest.mark.parametrize(("dim", "dim_v"), [(80, 80), (48, 64), (128, 32), (256, 48)])
@pytest.mark.parametrize("pv", ["same", "fp8"])
def test_head_dims(dim: int, dim_v: int, pv: str) -> None:
    check(draw(33, 40, heads=1, dim=dim, dim_v=dim_v), pv=pv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pv", ["same", "fp16"])
def test_dtypes(dtype: torch.dtype, pv: str) -> None:
    check(draw(40, 40, dtype=dtype), tiles(40, 40, 32, 32), pv=pv)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_groups_and_sharing(heads: int) -> None:
    check(draw(40, 40, heads=4, kv_heads=2), tiles(40, 40, 32, 32, heads=heads))


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (100, 96), (16, 16), (13, 12)])
def test_tiles_of_any_size(block_q: int, block_k: int) -> None:
    check(draw(50, 100), tiles(50, 100, block_q, block_k), pv="fp8" if block_k % 32 == 0 else "same")


def test_batches_without_causality() -> None:
    inputs = draw(40, 70, batch=2, heads=1)
    check(inputs, tiles(40, 70, 32, 32, batch=2, causal=False), pv="fp8")
    check(inputs, tiles(40, 70, 32, 64, batch=2, causal=False))


@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("pv", ["same", "fp8"])
def test_single_keys_and_unaligned_tiles(qk: str, pv: str) -> None:
    if pv == "same":
        check(draw(40, 60), singles(40, 60, 16), qk=qk)
        check(draw(64, 96), mixed(), qk=qk)
    else:  # steps end elsewhere than the oracle's, so weights are rounded relative to other maxima
        inputs = draw(64, 96)
        want = attend_low_bit(*inputs, mixed(), qk=qk, **SMALL, impl="reference").out.double()
        got = attend_low_bit(*inputs, mixed(), qk=qk, pv=pv, **SMALL, impl="triton").out.double()
        assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("smooth", [True, False])
def test_softcap_scale_and_smoothing(smooth: bool) -> None:
    check(draw(33, 40), softcap=2.0, scale=0.7, smooth=smooth)
    check(draw(16, 40), singles(16, 40, 16), softcap=2.0, smooth=smooth)
    check(draw(16, 40), scale=-0.3, smooth=smooth)
    check(draw(16, 40), qk="fp8", scale=-0.3, smooth=smooth, softcap=3.0)


OTHERS = (tiles(40, 130, 48, 64, share=0.8), tiles(40, 130, 32, 32, share=0.8, causal=False, heads=2))


@pytest.mark.parametrize("limit", [0.0, 2.0, math.inf])
@pytest.mark.parametrize("selection", [None, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)])
def test_skipping(selection: Selection | None, limit: float) -> None:
    q, k, v = draw(40, 130)
    q, k = q.abs(), k.abs()
    k[:, :, 32:96] -= 1.0  # logits there lie about 8 base-2 exponents below the others
    check((q, k, v), selection, skip_below=limit, causal=False)
    on, off = (attend_low_bit(q, k, v, selection, skip_below=x, causal=False, impl="triton", **SMALL).out for x in (limit, None))
    assert torch.equal(on, off) == (limit == math.inf)


def test_skipping_with_other_numbers() -> None:
    q, k, v = draw(40, 130)
    q, k = q.abs(), k.abs()
    k[:, :, 32:96] -= 1.0
    check((q, k, v), qk="fp8", pv="fp8", softcap=30.0, skip_below=2.0)


def test_rows_that_read_nothing() -> None:
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=DEVICE)
    mask[..., 1, 0] = True
    s = Selection.from_block_mask(mask, block_q=32, block_k=32, n_q=64, n_k=64)
    for pv in ("same", "fp8"):
        check(draw(64, 64, heads=1), s, pv=pv)
        part = attend_low_bit(*draw(64, 64, heads=1), s, pv=pv, impl="triton", return_lse=True, **SMALL)
        assert part.lse is not None
        assert bool((part.out[:, :, :32] == 0).all()) and bool((part.lse[:, :, :32] == -torch.inf).all())


def test_views_into_larger_buffers() -> None:
    """A growing cache and a transposed projection are read in place; what lies beyond the last key is never looked at."""
    q, k, v = draw(30, 48)
    buffer = [torch.full((1, 1, 64, 32), torch.nan, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    for held, x in zip(buffer, (k, v), strict=True):
        held[:, :, :48] = x
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    for s, pv in ((None, "same"), (tiles(30, 48, 32, 32), "fp8"), (singles(30, 48, 32), "same")):
        a = attend_low_bit(turned, buffer[0][:, :, :48], buffer[1][:, :, :48], s, pv=pv, impl="triton", **SMALL).out
        b = attend_low_bit(q, k, v, s, pv=pv, impl="triton", **SMALL).out
        assert torch.equal(a, b)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come full of nan (codes: of -1); what the kernels leave unwritten would show."""
    from saccade.ops.attend.low_bit.triton.launch import forward
    from saccade.ops.attend.triton.launch import lists_of

    q, k, v = draw(37, 45, heads=1, dtype=torch.float32)
    options = dict(causal=True, smooth=True, scale=0.2, softcap=0.0, skip_below=None, need_lse=True, **SMALL)
    cases = [
        (None if s is None else lists_of(s), qk, pv)
        for s, qk, pv in ((None, "int8", "fp8"), (tiles(37, 45, 32, 16), "fp8", "fp8"), (singles(37, 45, 32), "int8", "same"))
    ]
    clean = [forward(q, k, v, lists, qk=qk, pv=pv, **options) for lists, qk, pv in cases]
    plain = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        out = plain(*args, **kwargs)
        if out.dtype == torch.float8_e4m3fn:
            out.view(torch.uint8).fill_(0x7F)  # nan
            return out
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
    for (lists, qk, pv), (out, lse) in zip(cases, clean, strict=True):
        again, lse_again = forward(q, k, v, lists, qk=qk, pv=pv, **options)
        assert torch.equal(again, out) and torch.equal(lse_again, lse) and bool(out.isfinite().all())


def test_other_configs_give_the_same() -> None:
    from saccade.ops.attend.low_bit.triton.launch import Config, forward

    q, k, v = draw(70, 70, heads=1)
    options = dict(causal=True, qk="int8", pv="same", smooth=True, scale=0.2, softcap=0.0, skip_below=None, need_lse=True)
    a, _ = forward(q, k, v, None, block_q=32, block_k=32, **options)
    b, _ = forward(q, k, v, None, block_q=64, block_k=32, chosen=Config(32, 8, 3), **options)
    assert torch.allclose(a.float(), b.float(), atol=2e-3)


def test_through_the_compiler() -> None:
    from saccade.ops.attend.low_bit.triton import _attend
    from saccade.ops.attend.triton.launch import lists_of

    q, k, v = draw(20, 20)
    args = (q, k, v, *lists_of(tiles(20, 20, 16, 16)), True, "int8", "same", True, 0.2, 0.0, 32, 32, None, True)
    torch.library.opcheck(_attend, args, test_utils=("test_schema", "test_faketensor"))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return attend_low_bit(q, k, v, impl="triton", return_lse=True, **SMALL)

    out, lse = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    plain = run(q, k, v)
    assert torch.equal(out, plain[0]) and lse is not None and plain[1] is not None and torch.equal(lse, plain[1])


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture() -> None:
    if DEVICE == "cpu":
        pytest.skip("no GPU")
    inputs, s = draw(300, 300, heads=4, kv_heads=2, dim=64), tiles(300, 300, 128, 64)
    want = attend_low_bit(*inputs, s, pv="fp8").out
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attend_low_bit(*inputs, s, pv="fp8").out
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_low_bit(*inputs, s, pv="fp8").out
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want) and torch.equal(captured, want)


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        attend_low_bit(*(x.double() for x in draw(8, 8)), impl="triton")
    with pytest.raises(ValueError, match="256"):
        attend_low_bit(*draw(8, 8, dim=288), impl="triton")
