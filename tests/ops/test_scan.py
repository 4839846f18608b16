"""scan: the recurrence against a formula, the chunked form against the recurrence, one step against the whole, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.ops.scan import ScanState, chunked, scan, scan_step

GATES = ("none", "head", "token", "channel")
FORMS = [(gate, delta) for gate in GATES for delta in (False, True)]
F64 = torch.float64


def inputs(
    gate: str, delta: bool, *, b: int = 2, h: int = 2, n: int = 70, d: int = 8, dv: int = 6, strength: float = 1.0, seed: int = 0,
    heads: tuple[int, int, int] | None = None,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    hq, hk, hv = heads or (h, h, h)
    q, k, v = normal(b, hq, n, d), normal(b, hk, n, d), normal(b, hv, n, dv)
    k = k / k.norm(dim=-1, keepdim=True)
    shape = {"none": None, "head": (h,), "token": (b, h, n), "channel": (b, h, n, d)}[gate]
    options: dict[str, Any] = {"initial_state": normal(b, h, d, dv)}
    if shape:
        options["log_decay"] = -strength * torch.rand(*shape, generator=g, dtype=F64)
    if delta:
        options["beta"] = torch.rand(b, h, n, generator=g, dtype=F64)
    return [q, k, v], options


def as_dtype(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Rounded to `dtype`; gates and states stay in float32, as callers keep them."""
    side = F64 if dtype == F64 else torch.float32
    return [x.to(dtype) for x in tensors], {key: x.to(side) if isinstance(x, Tensor) else x for key, x in options.items()}


def doubled(tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    return [x.double() for x in tensors], {key: x.double() for key, x in options.items()}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_pieces_of_a_long_sequence_are_the_whole(gate: str, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, states and gradients; the last piece is short, and heads are shared."""
    tensors, options = inputs(gate, delta, h=4, n=3 * 64 + 11, heads=(4, 2, 1))
    leaves = [x.requires_grad_() for x in (*tensors, *options.values())]

    def run() -> list[Tensor]:
        out, state = scan(*tensors, **options, impl="chunked")
        assert isinstance(state, Tensor)
        return [out, state, *torch.autograd.grad((out.square().sum() + state.sum()), leaves)]

    whole = run()
    pieces: list[int] = []
    once = chunked._scan
    monkeypatch.setattr(chunked, "PIECE", 1)
    monkeypatch.setattr(chunked, "_scan", lambda p, chunk: (pieces.append(p.q.shape[2]), once(p, chunk))[1])
    for got, want in zip(run(), whole, strict=True):
        close(got, want)
    assert pieces == [64, 64, 64, 11]


@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_reference_is_the_formula(gate: str, delta: bool) -> None:
    (q, k, v), options = inputs(gate, delta, n=9)
    out, state = scan(q, k, v, **options, impl="reference")
    g, beta = options.get("log_decay"), options.get("beta")
    for b in range(2):
        for h in range(2):
            s = options["initial_state"][b, h].clone()
            for t in range(9):
                if g is not None:
                    s = torch.diag(torch.exp(g[h] if gate == "head" else g[b, h, t]) * torch.ones(8, dtype=F64)) @ s
                key, value = k[b, h, t], v[b, h, t]
                if beta is not None:
                    s = s - beta[b, h, t] * torch.outer(key, key) @ s + beta[b, h, t] * torch.outer(key, value)
                else:
                    s = s + torch.outer(key, value)
                close(out[b, h, t], s.T @ q[b, h, t] / math.sqrt(8), 1e-12)
            close(state[b, h], s, 1e-12)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_chunked_equals_reference(gate: str, delta: bool, n: int) -> None:
    tensors, options = inputs(gate, delta, n=n)
    want, last = scan(*tensors, **options, impl="reference")
    got, state = scan(*tensors, **options, impl="chunked")
    close(got, want)
    close(state, last)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS), n=st.integers(1, 140), d=st.integers(1, 9), dv=st.integers(1, 9),
    strength=st.sampled_from([0.01, 1.0, 50.0]),
    heads=st.sampled_from([(1, 1, 1), (4, 2, 2), (2, 4, 4), (4, 4, 2), (2, 2, 4), (6, 3, 2)]), start=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_problem(
    form: tuple[str, bool], n: int, d: int, dv: int, strength: float, heads: tuple[int, int, int], start: bool, seed: int
) -> None:
    tensors, options = inputs(*form, b=1, h=max(heads), n=n, d=d, dv=dv, strength=strength, heads=heads, seed=seed)
    if not start:
        options.pop("initial_state")
    want, last = scan(*tensors, **options, impl="reference")
    got, state = scan(*tensors, **options, impl="chunked")
    assert got.shape == (1, max(heads), n, dv)
    close(got, want)
    close(state, last)
    spread = [x.repeat_interleave(max(heads) // x.shape[1], dim=1) for x in tensors]
    close(scan(*spread, **options, impl="reference")[0], want, 0.0)


@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_float32_is_as_good_as_the_recurrence_in_float32(gate: str, delta: bool) -> None:
    for strength in (0.1, 5.0):
        tensors, options = as_dtype(*inputs(gate, delta, n=200, d=16, strength=strength), torch.float32)
        exact, _ = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
        naive = (scan(*tensors, **options, impl="reference")[0] - exact).abs().max()
        assert (scan(*tensors, **options, impl="chunked")[0] - exact).abs().max() <= 2 * naive + 1e-6


@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_bfloat16(gate: str, delta: bool) -> None:
    tensors, options = as_dtype(*inputs(gate, delta, n=130, d=16), torch.bfloat16)
    exact, last = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    naive = (scan(*tensors, **options, impl="reference")[0] - exact).abs().max()
    out, state = scan(*tensors, **options, impl="chunked")
    assert out.dtype == torch.bfloat16 and isinstance(state, Tensor) and state.dtype == torch.float32
    assert (out - exact).abs().max() <= 2 * naive + 1e-6
    close(state, last, 1e-5)


@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_gradients(gate: str, delta: bool) -> None:
    tensors, options = inputs(gate, delta, b=1, n=100, d=5, dv=4, heads=(2, 1, 1))
    leaves = [x.requires_grad_() for x in (*tensors, *options.values())]
    weights = torch.randn(1, 2, 100, 4, dtype=F64), torch.randn(1, 2, 5, 4, dtype=F64)
    grads = []
    for impl in ("reference", "chunked"):
        out, state = scan(*tensors, **options, impl=impl)
        assert isinstance(state, Tensor)
        grads.append(torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        close(got, want, 1e-9)


@pytest.mark.parametrize("strength", [0.5, 50.0])
@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_gradients_of_long_decays_are_finite(gate: str, delta: bool, strength: float) -> None:
    tensors, options = as_dtype(*inputs(gate, delta, b=1, n=128, strength=strength), torch.float32)
    leaves = [x.requires_grad_() for x in (*tensors, *options.values())]
    out, state = scan(*tensors, **options, impl="chunked")
    assert isinstance(state, Tensor)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum() + state.sum(), leaves))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(("gate", "delta"), [form for form in FORMS if form[0] != "none"])
def test_long_decays(gate: str, delta: bool, dtype: torch.dtype) -> None:
    """Gates down to -50 a token, mixed with gates near 0: every digit of the small ones counts."""
    (q, k, v), options = inputs(gate, delta, n=256, strength=50.0)
    g = options["log_decay"]
    weak = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    options["log_decay"] = torch.where(weak, g / 1e4, g)
    tensors, options = as_dtype([q, k, v], options, dtype)
    exact, last = scan(*doubled(tensors, options)[0], **doubled(tensors, options)[1], impl="reference")
    naive, _ = scan(*tensors, **options, impl="reference")
    got, state = scan(*tensors, **options, impl="chunked")
    if dtype == F64:
        close(got, exact)
        close(state, last)
    else:
        assert torch.isfinite(got).all()
        assert (got - exact).abs().max() <= 2 * (naive - exact).abs().max() + 1e-6


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", ["token", "channel"])
def test_minus_infinity_forgets(gate: str, delta: bool) -> None:
    (q, k, v), options = inputs(gate, delta, n=90)
    options["log_decay"][:, :, 37] = -math.inf
    for impl in ("reference", "chunked"):
        out, state = scan(q, k, v, **options, impl=impl)
        later = {key: x[:, :, 37:] for key, x in options.items() if key != "initial_state"}
        alone, last = scan(q[:, :, 37:], k[:, :, 37:], v[:, :, 37:], **later, impl="reference")
        close(out[:, :, 37:], alone)
        close(state, last)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_two_halves_are_the_whole(gate: str, delta: bool, impl: Any) -> None:
    (q, k, v), options = inputs(gate, delta, n=110)
    whole, last = scan(q, k, v, **options, impl=impl)
    state, outs = options.pop("initial_state"), []
    for part in (slice(0, 47), slice(47, 110)):
        side = {key: x if key == "log_decay" and gate == "head" else x[:, :, part] for key, x in options.items()}
        out, state = scan(q[:, :, part], k[:, :, part], v[:, :, part], **side, initial_state=state, impl=impl)
        outs.append(out)
    close(torch.cat(outs, dim=2), whole)
    close(state, last)


@pytest.mark.parametrize("normalise", [None, "sum"])
@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_steps_are_the_scan(gate: str, delta: bool, normalise: Any) -> None:
    if delta and normalise:
        return
    (q, k, v), options = inputs(gate, delta, n=70, heads=(2, 1, 1))
    if normalise:
        q, k = q.exp(), k.exp()
        options["initial_state"] = ScanState(options["initial_state"], torch.rand(2, 2, 8, dtype=F64))
    whole, last = scan(q, k, v, **options, normalise=normalise, impl="chunked")
    state = options.pop("initial_state")
    for t in range(70):
        side = {key: x if key == "log_decay" and gate == "head" else x[:, :, t] for key, x in options.items()}
        out, state = scan_step(q[:, :, t], k[:, :, t], v[:, :, t], state, **side, normalise=normalise)
        close(out, whole[:, :, t])
    assert saccade.last_run().impl == "step"
    for got, want in zip(state if normalise else [state], last if normalise else [last], strict=True):
        close(got, want)
    again, _ = scan(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert saccade.last_run().impl == "step" and again.shape == (2, 2, 1, 6)


def test_the_sum_of_weights_is_one() -> None:
    (q, k, v), options = inputs("token", False, n=70)
    q, k = q.exp(), k.exp()
    out, state = scan(q, k, v, log_decay=options["log_decay"], normalise="sum", impl="chunked")
    assert isinstance(state, ScanState) and state.s.shape == (2, 2, 8, 6) and state.z.shape == (2, 2, 8)
    after = options["log_decay"].cumsum(-1)
    weight = ((q @ k.mT) * (after[..., :, None] - after[..., None, :]).exp()).tril()
    close(out, weight / weight.sum(-1, keepdim=True) @ v)
    zero, _ = scan(torch.zeros_like(q), k, v, normalise="sum")
    assert (zero == 0).all()
    q.requires_grad_()
    grads = torch.autograd.grad(scan(q * 0, k, v, normalise="sum", impl="chunked")[0].sum(), q)
    assert torch.isfinite(grads[0]).all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(("gate", "delta"), FORMS)
def test_packed_sequences(gate: str, delta: bool, impl: Any) -> None:
    (q, k, v), options = inputs(gate, delta, b=1, n=150)
    ends = [0, 1, 70, 70, 150]
    start = torch.randn(4, 2, 8, 6, dtype=F64)
    options["initial_state"] = start
    out, states = scan(q, k, v, **options, cu_seqlens=torch.tensor(ends), impl=impl)
    assert isinstance(states, Tensor) and states.shape == (4, 2, 8, 6)
    close(states[2], start[2], 0.0)  # a sequence without tokens keeps its state
    for i, (a, z) in enumerate(pairwise(ends)):
        if a == z:
            continue
        side = {key: x if key == "log_decay" and gate == "head" else x[:, :, a:z] for key, x in options.items() if key != "initial_state"}
        alone, last = scan(q[:, :, a:z], k[:, :, a:z], v[:, :, a:z], **side, initial_state=start[i : i + 1], impl="reference")
        close(out[:, :, a:z], alone)
        close(states[i : i + 1], last)


def test_forms_that_meet() -> None:
    """Equal gates over channels are one gate a token; a constant one a gate a head; no gate is a gate of 0; beta 0 only decays."""
    (q, k, v), options = inputs("token", True, n=80)
    g, beta, s0 = options["log_decay"], options["beta"], options["initial_state"]
    by_token, _ = scan(q, k, v, log_decay=g, beta=beta, impl="chunked")
    close(scan(q, k, v, log_decay=g[..., None].expand(*g.shape, 8), beta=beta, impl="chunked")[0], by_token)
    close(scan(q, k, v, log_decay=g * 0, beta=beta, impl="chunked")[0], scan(q, k, v, beta=beta, impl="chunked")[0])
    head = torch.tensor([-0.1, -0.7], dtype=F64)
    close(scan(q, k, v, log_decay=head, impl="chunked")[0], scan(q, k, v, log_decay=head[None, :, None].expand(2, 2, 80))[0])
    _, state = scan(q, k, v, log_decay=g, beta=beta * 0, initial_state=s0, impl="chunked")
    close(state, s0 * g.sum(-1).exp()[..., None, None])


def test_the_delta_rule_overwrites() -> None:
    """With orthonormal keys and beta 1 a key returns the value written last; without beta the values add up."""
    k = torch.eye(8, dtype=F64).repeat(10, 1)[None, None]
    v = torch.randn(1, 1, 80, 5, dtype=F64)
    _, state = scan(k, k, v, beta=torch.ones(1, 1, 80, dtype=F64), impl="chunked")
    close(state, v[:, :, -8:])
    _, total = scan(k, k, v, impl="chunked")
    close(total, v.unflatten(2, (10, 8)).sum(2))


def test_scale_and_what_ran() -> None:
    (q, k, v), _ = inputs("none", False)
    close(scan(q, k, v, scale=1.0)[0], scan(q, k, v)[0] * math.sqrt(8))
    run = saccade.last_run()
    assert (run.op, run.impl, run.n_q, run.heads) == ("scan", "chunked", 70, 2)
    out, state = scan(q, k, v, return_state=False, impl="reference")
    assert state is None and saccade.last_run().impl == "reference" and out.shape == (2, 2, 70, 6)


def test_the_future_does_not_matter() -> None:
    for gate, delta in FORMS:
        (q, k, v), options = inputs(gate, delta, n=90)
        before, _ = scan(q, k, v, **options, impl="chunked")
        for x in (q, k, v, *(options[key] for key in ("beta",) if key in options)):
            x[:, :, 50:] = 0.3
        close(scan(q, k, v, **options, impl="chunked")[0][:, :, :50], before[:, :, :50], 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 2, 70)}, ValueError, "expected \\(B, H, N, D\\)"),
        ({"k": torch.zeros(2, 2, 70, 8)}, TypeError, "one dtype"),
        ({"k": torch.zeros(2, 2, 70, 9, dtype=F64)}, ValueError, "do not fit"),
        ({"k": torch.zeros(2, 3, 70, 8, dtype=F64), "v": torch.zeros(2, 3, 70, 8, dtype=F64)}, ValueError, "head counts"),
        ({"log_decay": torch.zeros(3)}, ValueError, "log_decay has shape"),
        ({"beta": torch.zeros(2, 2, 70, 6)}, ValueError, "beta has shape"),
        ({"beta": torch.zeros(2, 2, 70, dtype=torch.int64)}, TypeError, "beta must be"),
        ({"beta": torch.zeros(2, 2, 70), "normalise": "sum"}, ValueError, "no sum of keys"),
        ({"normalise": "max"}, ValueError, "normalise"),
        ({"normalise": "sum", "initial_state": torch.zeros(2, 2, 8, 6)}, ValueError, "ScanState"),
        ({"initial_state": torch.zeros(2, 2, 8, 8)}, ValueError, "initial_state is"),
        ({"cu_seqlens": torch.tensor([0, 70])}, ValueError, "batch 1"),
        ({"cu_seqlens": torch.tensor([0.0, 70.0])}, TypeError, "cu_seqlens"),
        ({"impl": "fast"}, ValueError, "not one of"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], error: type[Exception], words: str) -> None:
    (q, k, v), _ = inputs("none", False)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(error, match=words):
        scan(**arguments)


def test_refuses_lengths_that_do_not_add_up() -> None:
    (q, k, v), _ = inputs("none", False, b=1)
    for ends in ([0, 60], [1, 70], [0, 50, 40, 70]):
        with pytest.raises(ValueError, match="ascend from 0 to N"):
            scan(q, k, v, cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match="one token"):
        scan_step(q, k, v, None)
