"""scan in Triton against the recurrence in float64: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.marks import long_when_interpreted
from tests.ops.poison import poison

pytest.importorskip("triton")

import saccade
from saccade.ops.scan import ScanState, scan
from saccade.ops.scan.problem import check

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GATES = ("none", "head", "token", "channel")
FORMS = [(gate, delta) for gate in GATES for delta in (False, True)]
TRIO = (("reference", True), ("reference", False), ("triton", False))
QUICK = [("none", False), ("none", True), ("head", False), ("token", True)]
HALF = [("none", True), ("token", False), ("channel", True)]  # the interpreter is slow: 16 bits for three forms


@pytest.fixture(autouse=True)
def same_numbers_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison(monkeypatch)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one small chunk, so that short sequences are cut as long ones are."""
    from saccade.ops.scan.triton import adjoint, backward, launch

    cuts = {"chunk": 32, "shortest": 1, "programs": 1e9, "back_programs": 1e9}
    for module in (launch, backward, adjoint):
        monkeypatch.setattr(module, "config", lambda *a, f=module.config, **k: replace(f(*a, **k), **cuts))


def inputs(
    gate: str, delta: bool, dtype: torch.dtype = torch.float32, *, b: int = 1, n: int = 70, d: int = 20, dv: int = 24, sequences: int = 0,
    heads: tuple[int, int, int] = (2, 1, 1), strength: float = 1.0, start: bool = True, seed: int = 0,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    h = max(heads)
    q, k, v = (torch.randn(b, x, n, y, generator=g) for x, y in zip(heads, (d, d, dv), strict=True))
    k = k / k.norm(dim=-1, keepdim=True)
    options: dict[str, Any] = {}
    shape = {"none": None, "head": (h,), "token": (b, h, n), "channel": (b, h, n, d)}[gate]
    if shape:
        options["log_decay"] = -strength * torch.rand(*shape, generator=g)
    if delta:
        options["beta"] = torch.rand(b, h, n, generator=g)
    if start:
        options["initial_state"] = torch.randn(sequences or b, h, d, dv, generator=g)
    return [x.to(DEVICE, dtype) for x in (q, k, v)], {key: x.to(DEVICE) for key, x in options.items()}


def doubled(tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    wide = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in options.items()}
    return [x.double() for x in tensors], wide


def plain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None, initial_state: Tensor | None = None
) -> Tensor:
    """The recurrence as plain torch code in the dtype of q has it: products in that dtype, the state summed in float32."""
    h = max(x.shape[1] for x in (q, k, v))
    q, k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (q, k, v))
    state = initial_state.clone() if initial_state is not None else q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    outs = []
    for t in range(q.shape[2]):
        if log_decay is not None:
            g = log_decay[None, :, None] if log_decay.ndim == 1 else log_decay[:, :, t]
            state = state * (g if g.ndim == 3 else g[..., None]).exp()[..., None]
        new = v[:, :, t].float()
        if beta is not None:
            new = beta[:, :, t, None] * (new - (k[:, :, t, None, :] @ state.to(q.dtype)).squeeze(-2))
        state = state + k[:, :, t].float()[..., None] * new[..., None, :]
        outs.append((q[:, :, t, None, :] @ state.to(q.dtype)).squeeze(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outs, dim=2)


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def allowed(dtype: torch.dtype) -> float:
    """Twice the error of plain code; the interpreter cuts bfloat16 off where a GPU rounds, which costs two to four times as much."""
    return 2.0 if CUDA or dtype != torch.bfloat16 else 8.0


@pytest.mark.parametrize(
    ("gate", "delta", "dtype"),
    [(*form, torch.float32) for form in FORMS] + [(*form, torch.float16) for form in (FORMS if CUDA else HALF)],
)
@long_when_interpreted
def test_forward_in_segments(gate: str, delta: bool, dtype: torch.dtype, short: None) -> None:
    tensors, options = inputs(gate, delta, dtype)
    exact, last = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    out, state = scan(*tensors, **options, impl="triton")
    assert saccade.last_run().impl == "triton" and out.dtype == dtype and isinstance(state, Tensor) and state.dtype == torch.float32
    assert error(out, exact) <= 2 * error(plain(*tensors, **options), exact) + 1e-6
    assert error(state, last) <= (2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_forward_in_one_piece(gate: str, delta: bool) -> None:
    heads = (2, 1, 1) if CUDA else (1, 1, 1)
    tensors, options = inputs(gate, delta, torch.bfloat16, n=65, d=16, dv=16, heads=heads, start=False)
    exact, _ = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    out, _ = scan(*tensors, **options, impl="triton")
    assert error(out, exact) <= allowed(torch.bfloat16) * error(plain(*tensors, **options), exact) + 1e-6


@pytest.mark.parametrize(("gate", "delta"), [("none", True), pytest.param("channel", False, marks=pytest.mark.slow), ("channel", True)])
def test_weak_gates(gate: str, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tokens far apart give each other is not forgotten: all blocks of a chunk, and all segments, are in the output."""
    from saccade.ops.scan.triton import launch

    cuts = {"chunk": 64, "shortest": 1, "programs": 1e9}
    monkeypatch.setattr(launch, "config", lambda *a, f=launch.config, **k: replace(f(*a, **k), **cuts))
    tensors, options = inputs(gate, delta, n=150, d=16, dv=16, heads=(1, 1, 1), strength=0.02)
    exact, last = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    out, state = scan(*tensors, **options, impl="triton")
    assert error(out, exact) <= 2e-6 and error(state, last) <= 2e-6


@pytest.mark.parametrize(
    ("gate", "delta", "n", "d", "dv", "heads"),
    [
        ("none", False, 1, 16, 16, (1, 1, 1)), ("token", True, 2, 16, 16, (1, 1, 1)), ("channel", True, 33, 16, 80, (1, 1, 1)),
        ("token", False, 33, 80, 48, (1, 2, 2)), ("head", True, 40, 48, 96, (1, 1, 1)), ("channel", False, 31, 96, 16, (1, 1, 1)),
        ("none", True, 32, 128, 16, (1, 1, 1)), ("token", False, 32, 256, 48, (1, 1, 1)), ("token", True, 33, 256, 16, (1, 1, 1)),
        ("channel", True, 20, 128, 128, (1, 1, 1)),
    ],
)  # fmt: skip
def test_shapes(gate: str, delta: bool, n: int, d: int, dv: int, heads: tuple[int, int, int], short: None) -> None:
    tensors, options = inputs(gate, delta, torch.float16, n=n, d=d, dv=dv, heads=heads)
    exact, _ = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    out, _ = scan(*tensors, **options, impl="triton")
    assert error(out, exact) <= 2 * error(plain(*tensors, **options), exact) + 1e-6


@pytest.mark.parametrize(("gate", "delta"), FORMS)
@long_when_interpreted
def test_packed_sequences(gate: str, delta: bool, short: None) -> None:
    ends = [0, 1, 36, 36, 45]
    tensors, options = inputs(gate, delta, n=45, d=16, dv=16, sequences=4, heads=(1, 1, 1))
    cu = torch.tensor(ends, device=DEVICE, dtype=torch.int32)
    exact, last = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], cu_seqlens=cu, impl="reference")
    out, state = scan(*tensors, **options, cu_seqlens=cu, impl="triton")
    assert error(out, exact) <= 2e-6
    for i in range(4):
        assert error(state[i], last[i]) <= 2e-6


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", ["head", "token", "channel"])
@long_when_interpreted
def test_long_decays(gate: str, delta: bool, short: None) -> None:
    """Gates down to -50 a token among gates near 0, and one that forgets all: finite, and as good as the recurrence in float32."""
    tensors, options = inputs(gate, delta, n=128 if CUDA else 70, d=16, dv=16, heads=(1, 1, 1), strength=50.0)
    g = options["log_decay"]
    if gate != "head":
        weak = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.8
        g = torch.where(weak.to(DEVICE), g / 1e4, g)
        g[:, :, 37] = -math.inf
        options["log_decay"] = g
    exact, _ = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    naive, _ = scan(*tensors, **options, impl="reference")
    out, state = scan(*tensors, **options, impl="triton")
    assert torch.isfinite(out).all() and torch.isfinite(state).all()
    assert (out - exact).abs().max() <= 2 * (naive - exact).abs().max() + 1e-6


def test_normalised(short: None) -> None:
    (q, k, v), options = inputs("token", False, torch.float16, n=40, dv=16)
    q, k = (x.abs() + 0.1 for x in (q, k))
    options["initial_state"] = ScanState(options["initial_state"], torch.rand(1, 2, 20, device=DEVICE))
    exact, last = scan(q.double(), k.double(), v.double(), **options, normalise="sum", impl="reference")
    out, state = scan(q, k, v, **options, normalise="sum", impl="triton")
    assert error(out, exact) <= 2e-3
    assert isinstance(state, ScanState) and isinstance(last, ScanState) and error(state.z, last.z) <= 1e-3


def gradients(
    tensors: list[Tensor], options: dict[str, Any], impl: Any, weights: tuple[Tensor, Tensor], wide: bool = False, **more: Any
) -> list[Tensor]:
    if wide:
        tensors, options = doubled(tensors, options)
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *options.values())]
    out, state = scan(*leaves[:3], **dict(zip(options, leaves[3:], strict=True)), impl=impl, **more)
    assert isinstance(state, Tensor)
    loss = (out.to(state.dtype) * weights[0].to(state.dtype)).sum() + (state * weights[1].to(state.dtype)).sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("gate", "delta", "dtype"),
    [
        # in the interpreter the other forms with gates take seconds each
        (*form, torch.float32) if CUDA or form in QUICK else pytest.param(*form, torch.float32, marks=pytest.mark.slow) for form in FORMS
    ] + [(*form, torch.float16) for form in (FORMS if CUDA else [("token", False)])],
)
def test_gradients(gate: str, delta: bool, dtype: torch.dtype, short: None) -> None:
    n, heads = (70, (2, 1, 1)) if CUDA else (40, (1, 1, 1) if gate in ("none", "head") else (2, 1, 1))
    tensors, options = inputs(gate, delta, dtype, n=n, heads=heads)
    weights = torch.randn(1, max(heads), n, 24, device=DEVICE), torch.randn(1, max(heads), 20, 24, device=DEVICE)
    exact, naive, got = (gradients(tensors, options, impl, weights, wide=wide) for impl, wide in TRIO)
    assert saccade.last_run().impl == "triton"
    for x, y, z, leaf in zip(got, naive, exact, (*tensors, *options.values()), strict=True):
        assert x.dtype == leaf.dtype and x.shape == leaf.shape
        # the recurrence above keeps every product of 16-bit inputs in float32: two more roundings a product are those of the dtype
        assert error(x, z) <= 2 * error(y, z) + (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(("gate", "delta"), [("token", True), ("channel", True)])
@long_when_interpreted
def test_gradients_in_chunks_of_64(gate: str, delta: bool) -> None:
    """The tiles of 16 bits, in one piece; the chunked form in the same dtype of inputs is what plain torch gives."""
    n, dtype = 67, torch.bfloat16
    tensors, options = inputs(gate, delta, dtype, n=n, d=32, dv=32, heads=(1, 1, 1), strength=0.2)
    weights = torch.randn(1, 1, n, 32, device=DEVICE), torch.randn(1, 1, 32, 32, device=DEVICE)
    exact, naive, got = (gradients(tensors, options, impl, weights, wide=wide) for impl, wide in TRIO)
    for x, y, z in zip(got, naive, exact, strict=True):
        assert error(x, z) <= 2 * error(y, z) + (1e-2 if CUDA else 3e-2)


@pytest.mark.parametrize(("gate", "delta"), [("head", True), ("token", True), ("channel", False), ("channel", True)])
@long_when_interpreted
def test_gradients_under_long_decays(gate: str, delta: bool, short: None) -> None:
    """Gates down to -10000 a token among gates near 0, and one of -inf: finite, and as good as the recurrence in float32."""
    n = 40
    tensors, options = inputs(gate, delta, n=n, d=16, dv=16, heads=(1, 1, 1), strength=1e4)
    g = options["log_decay"]
    if gate != "head":
        weak = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.8
        g = torch.where(weak.to(DEVICE), g / 1e6, g)
        g[:, :, 11] = -math.inf
        options["log_decay"] = g
    weights = torch.randn(1, 1, n, 16, device=DEVICE), torch.randn(1, 1, 16, 16, device=DEVICE)
    exact, naive, got = (gradients(tensors, options, impl, weights, wide=wide) for impl, wide in TRIO)
    for x, y, z in zip(got, naive, exact, strict=True):
        assert torch.isfinite(x).all()
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-6 * z.abs().max().clamp_min(1.0)


@pytest.mark.parametrize(("delta", "seed"), [(False, 0), (False, 6), (True, 0), (True, 6)] if CUDA else [(False, 6)])
def test_gradient_of_a_gate_that_all_tokens_share(delta: bool, seed: int, short: None) -> None:
    """Its tokens' parts nearly cancel (15 times their sum with seed 6), so errors of one sign in a chunk would show."""
    torch.manual_seed(seed)
    tensors, options = inputs("head", delta)
    weights = torch.randn(1, 2, 70, 24, device=DEVICE), torch.randn(1, 2, 20, 24, device=DEVICE)
    exact, naive, got = (gradients(tensors, options, impl, weights, wide=wide)[3] for impl, wide in TRIO)
    assert error(got, exact) <= 2 * error(naive, exact) + 1e-6


@pytest.mark.parametrize(("gate", "delta"), [("token", False), ("none", True), ("channel", True)])
@long_when_interpreted
def test_gradients_of_packed_sequences(gate: str, delta: bool, short: None) -> None:
    cu = torch.tensor([0, 1, 36, 36, 45], device=DEVICE)
    tensors, options = inputs(gate, delta, n=45, d=16, dv=16, sequences=4, heads=(1, 1, 1))
    weights = torch.randn(1, 1, 45, 16, device=DEVICE), torch.randn(4, 1, 16, 16, device=DEVICE)
    exact = gradients(tensors, options, "reference", weights, wide=True, cu_seqlens=cu)
    for x, z in zip(gradients(tensors, options, "triton", weights, cu_seqlens=cu), exact, strict=True):
        assert error(x, z) <= 1e-5


@pytest.mark.parametrize("delta", [False, True])
def test_gradient_of_the_state_alone_and_of_some_inputs(delta: bool, short: None) -> None:
    (q, k, v), options = inputs("token", delta, n=40, d=16, dv=16)
    k.requires_grad_()
    _, state = scan(q, k, v, **options, impl="triton")
    wide = k.detach().double().requires_grad_()
    more = doubled([], options)[1]
    _, want = scan(q.double(), wide, v.double(), **more, impl="reference")
    got = torch.autograd.grad(state.square().sum(), k)[0]
    assert error(got, torch.autograd.grad(want.square().sum(), wide)[0]) <= 1e-5


def test_layouts_and_determinism(short: None) -> None:
    """(B, N, H, D) in memory is read where it lies; two runs agree to the bit."""
    (q, k, v), options = inputs("token", True, torch.float16, n=50, d=16, dv=16, heads=(2, 2, 2))
    out, state = scan(q, k, v, **options, impl="triton")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    again, same = scan(*turned, **options, impl="triton")
    assert torch.equal(out, again) and torch.equal(state, same)


@pytest.mark.parametrize(("gate", "delta"), [("token", False), ("channel", True)])
@long_when_interpreted
def test_compiles_into_one_graph(gate: str, delta: bool) -> None:
    tensors, options = inputs(gate, delta, n=20, d=16, dv=16, heads=(1, 1, 1))
    q = tensors[0].requires_grad_()

    def run(x: Tensor) -> Tensor:
        out, state = scan(x, *tensors[1:], **options, impl="triton")
        assert isinstance(state, Tensor)
        return out.sum() + state.sum()

    want = torch.autograd.grad(run(q), q)[0]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager" if not CUDA else "inductor")
    assert error(torch.autograd.grad(compiled(q), q)[0], want.double()) <= 1e-6


def test_what_it_refuses() -> None:
    from saccade.ops.scan import triton as kernels

    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        scan(q, q, q, impl="triton")
    wide = torch.zeros(1, 1, 4, 320, device=DEVICE)
    with pytest.raises(ValueError, match="up to 256"):
        scan(wide, wide, wide, impl="triton")
    assert kernels.refusal(check(q.float(), q.float(), q.float(), None, None, None, None, None, None)) is None


@pytest.mark.parametrize(
    ("n", "programs", "segments"), [(131072, 2.0, 8), (131072, 1.0, 4), (8192, 2.0, 8), (131072, 0.25, 1), (256, 64.0, 1)]
)
def test_segments_have_one_length(n: int, programs: float, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 132 multiprocessors, 16 heads and 2 blocks of values: no short segment is left over, so all programs run side by side."""
    from saccade.ops.scan.triton import config

    monkeypatch.setattr(config, "multiprocessors", lambda x: 132)
    c = replace(config.config(128, 128, torch.bfloat16, delta=True, channel=False), programs=programs)
    length = config.segment_length(c, torch.empty(0), n, 1, 16, 2, splits=True)
    assert -(-n // length) == segments and length * segments == n


@pytest.mark.skipif(not CUDA, reason="long sequences take a GPU")
@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_long_sequences(gate: str, delta: bool) -> None:
    """The configurations that are used for real, against the chunked form in float64."""
    tensors, options = inputs(gate, delta, torch.bfloat16, n=5000, d=128, dv=128, heads=(4, 4, 4), strength=0.1)
    exact, last = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="chunked")
    out, state = scan(*tensors, **options)
    assert saccade.last_run().impl == "triton"
    assert error(out, exact) <= 2 * error(plain(*tensors, **options), exact) + 1e-6
    assert error(state, last) <= 1e-2
    ends = [0, 100, 3000, 5000]
    packed, _ = scan(*tensors, **{k: x for k, x in options.items() if k != "initial_state"}, cu_seqlens=torch.tensor(ends, device=DEVICE))
    for a, z in pairwise(ends):
        side = {key: x if x.ndim == 1 else x[:, :, a:z] for key, x in options.items() if key != "initial_state"}
        alone, _ = scan(*(x[:, :, a:z] for x in tensors), **side)
        assert error(packed[:, :, a:z], alone.double()) <= 1e-2


@pytest.mark.skipif(not CUDA, reason="CUDA graphs take a GPU")
def test_runs_in_a_cuda_graph() -> None:
    tensors, options = inputs("channel", True, torch.bfloat16, n=300, d=64, dv=64)
    cu = torch.tensor([0, 100, 300], device=DEVICE)
    options.pop("initial_state")
    want, _ = scan(*tensors, **options, cu_seqlens=cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = scan(*tensors, **options, cu_seqlens=cu)
    graph.replay()
    assert torch.equal(out, want)
