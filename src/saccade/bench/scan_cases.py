"""Cases of `scan`: one for each form of the recurrence, next to flash-linear-attention and dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench import peers
from saccade.bench.case import Case, Contestant, Field, Run, Settings, Skip, Work
from saccade.bench.exact import verdict
from saccade.ops import last_run
from saccade.ops.scan import scan, scan_step

# form: the shape of its decay, whether it has the delta rule
FORMS = {
    "lightning": ("head", False), "scalar gate": ("token", False), "vector gate": ("channel", False), "delta": ("none", True),
    "gated delta": ("token", True), "kda": ("channel", True),
}  # fmt: skip
CHUNK = 64
EXACT, NAIVE = 4096, 256  # tokens that are judged, and tokens that plain code goes through one by one


@dataclass(frozen=True)
class Shape:
    n: int
    heads: int = 16
    dim: int = 128
    batch: int = 1


@dataclass(frozen=True)
class Inputs:
    """(B, H, N, D) views of (B, N, H, D) memory: the layout that fla takes, so that both read the same."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None

    def part(self, n: int, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """The first n tokens of the first head."""
        g, b = self.log_decay, self.beta
        decay = None if g is None else (g[:1] if g.ndim == 1 else g[:1, :1, :n]).detach().to(torch.promote_types(dtype, torch.float32))
        q, k, v = (x[:1, :1, :n].detach().to(dtype) for x in (self.q, self.k, self.v))
        return (q, k, v), {"log_decay": decay, "beta": None if b is None else b[:1, :1, :n].detach().to(dtype)}

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.q, self.k, self.v, self.log_decay, self.beta) if x is not None and x.requires_grad)


def _inputs(form: str, shape: Shape, s: Settings, grad: bool) -> Inputs:
    gate, delta = FORMS[form]
    generator = s.generator()
    wide = torch.float32

    def normal(*extra: int) -> Tensor:
        return s.normal(shape.batch, shape.n, shape.heads, *extra, generator=generator, dtype=wide)

    q, k, v = (normal(shape.dim) for _ in range(3))
    q, k = F.normalize(q, dim=-1) * shape.dim**0.25, F.normalize(k, dim=-1)
    decay = {
        "none": lambda: None, "head": lambda: -torch.linspace(0.001, 0.05, shape.heads, device=s.device),
        "token": lambda: -normal().abs() * 0.03, "channel": lambda: -normal(shape.dim).abs() * 0.03,
    }[gate]()  # fmt: skip
    beta = normal().sigmoid().to(s.dtype) if delta else None
    q, k, v, beta = (None if x is None else x.to(s.dtype).requires_grad_(grad) for x in (q, k, v, beta))
    if decay is not None and gate != "head":
        decay = decay.requires_grad_(grad)
    assert q is not None and k is not None and v is not None
    q, k, v, decay, beta = (x if x is None or x.ndim == 1 else x.transpose(1, 2) for x in (q, k, v, decay, beta))
    return Inputs(q, k, v, decay, beta)


def work(form: str, shape: Shape, size: int, grad: bool) -> Work:
    """Bytes: q, k, v, out and the gates, once; with the backward pass each once more, with its gradient. Operations: those of the
    chunked form with chunks of 64, 4 D D for the state and 4 C D / 2 within the chunk for each token, twice that under the delta rule."""
    gate, delta = FORMS[form]
    tokens = shape.batch * shape.heads * shape.n
    gates = 4 * {"none": 0, "head": 0, "token": 1, "channel": shape.dim}[gate] + size * delta
    flops = tokens * (4 * shape.dim**2 + 2 * CHUNK * shape.dim) * (2 if delta else 1)
    moved = tokens * (4 * shape.dim * size + gates)
    return Work(flops=flops * (3.0 if grad else 1.0), bytes=moved * (3.0 if grad else 1.0), unit="byte")


def _fla(form: str, x: Inputs, d_out: Tensor | None) -> Run:
    module, why = peers.library("fla")
    if module is None:
        raise Skip(why)
    q, k, v, g, b = (y if y is None or y.ndim == 1 else y.transpose(1, 2) for y in (x.q, x.k, x.v, x.log_decay, x.beta))
    if form in ("lightning", "scalar gate"):
        from fla.ops.simple_gla import chunk_simple_gla

        gates = {"g_gamma": g} if form == "lightning" else {"g": g}
        run: Callable[[], Any] = lambda: chunk_simple_gla(q, k, v, **gates)  # noqa: E731
    elif form == "vector gate":
        from fla.ops.gla import chunk_gla

        run = lambda: chunk_gla(q, k, v, g)  # noqa: E731
    elif form == "delta":
        from fla.ops.delta_rule import chunk_delta_rule

        run = lambda: chunk_delta_rule(q, k, v, b)  # noqa: E731
    elif form == "gated delta":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        run = lambda: chunk_gated_delta_rule(q, k, v, g, b)  # noqa: E731
    else:
        from fla.ops.kda import chunk_kda

        run = lambda: chunk_kda(q, k, v, g, b)  # noqa: E731
    call = peers.backward_of(lambda: run()[0], x.leaves, None if d_out is None else d_out.transpose(1, 2))
    return Run(call=call, outputs=lambda raw: ((raw if d_out is None else raw[0]).transpose(1, 2),), impl="fla")


class ScanCheck:
    """The first head over its first EXACT tokens, against float64. Allowed: twice the error of the recurrence token by token in the
    dtype of the inputs (products in that dtype, the state in float32) over the first NAIVE tokens, plus 1e-6."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        self._known: tuple[Tensor, float] | None = None

    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        n = min(EXACT, outputs[0].shape[2])
        if self._known is None:
            (q, k, v), options = self.x.part(n, torch.float64)
            exact = scan(q, k, v, impl="chunked", return_state=False, **options)[0]
            few = min(NAIVE, n)
            self._known = exact, verdict([exact[:, :, :few]], [self._plain(few)], [exact[:, :, :few]])[1]
        exact, allowed = self._known
        return verdict([outputs[0][:1, :1, :n].detach()], [exact], [exact])[0], allowed

    def _plain(self, n: int) -> Tensor:
        (q, k, v), options = self.x.part(n, self.x.q.dtype)
        decay, beta = options["log_decay"], options["beta"]
        state = q.new_zeros(1, 1, q.shape[-1], v.shape[-1], dtype=torch.float32)
        outs = []
        for t in range(n):
            if decay is not None:
                g = decay[None, :, None] if decay.ndim == 1 else decay[:, :, t]
                state = state * (g if g.ndim == 3 else g[..., None]).exp()[..., None]
            new = v[:, :, t].float()
            if beta is not None:
                new = beta[:, :, t, None] * (new - (k[:, :, t, None, :] @ state.to(q.dtype)).squeeze(-2))
            state = state + k[:, :, t].float()[..., None] * new[..., None, :]
            outs.append((q[:, :, t, None, :] @ state.to(q.dtype)).squeeze(-2) * q.shape[-1] ** -0.5)
        return torch.stack(outs, dim=2)


def _build(form: str, shape: Shape, grad: bool, s: Settings) -> Field:
    x = _inputs(form, shape, s, grad)
    amount = work(form, shape, s.size, grad)
    d_out = s.normal(shape.batch, shape.n, shape.heads, shape.dim).transpose(1, 2) if grad else None
    impl: Any = s.impl

    def ours() -> Run:
        def forward() -> Tensor:
            return scan(x.q, x.k, x.v, log_decay=x.log_decay, beta=x.beta, impl=impl, return_state=False)[0]

        return Run(
            call=peers.backward_of(forward, x.leaves, d_out), outputs=lambda raw: (raw if d_out is None else raw[0],),
            impl=lambda: last_run().impl,
        )  # fmt: skip

    contestants = [Contestant(name="saccade", role="ours", work=amount, make=ours)]
    if peers.library("fla")[0] is not None and s.cuda:
        contestants.append(Contestant(name="fla", role="peer", work=amount, make=lambda: _fla(form, x, d_out)))
    if not grad:
        pairs = shape.batch * shape.heads * shape.n * (shape.n + 1) / 2
        dense = Work(flops=4 * shape.dim * pairs, bytes=4.0 * x.q.numel() * s.size, unit="FLOP")
        contestants += peers.dense(peers.Inputs(x.q.contiguous(), x.k.contiguous(), x.v.contiguous()), dense, checked=False)[:1]
    return Field(contestants=contestants, check=ScanCheck(x))


def _step(form: str, shape: Shape, s: Settings) -> Field:
    """One token for `batch` sequences: the state is read and written."""
    x = _inputs(form, Shape(1, shape.heads, shape.dim, shape.batch), s, False)
    state = s.normal(shape.batch, shape.heads, shape.dim, shape.dim, dtype=torch.float32)
    q, k, v = (y.squeeze(2) for y in (x.q, x.k, x.v))
    gates: dict[str, Any] = {
        "log_decay": x.log_decay if x.log_decay is None or x.log_decay.ndim == 1 else x.log_decay.squeeze(2),
        "beta": None if x.beta is None else x.beta.squeeze(2),
    }
    amount = Work(flops=5.0 * state.numel(), bytes=8.0 * state.numel(), unit="byte")
    ours = Run(call=lambda: scan_step(q, k, v, state, **gates), outputs=lambda raw: (raw[0],), impl=lambda: last_run().impl)
    return Field(contestants=[Contestant(name="saccade", role="ours", work=amount, make=lambda: ours, checked=False)])


def case(form: str, shape: Shape, grad: bool = False) -> Case:
    if form not in FORMS:
        raise ValueError(f"{form!r} is no form of scan: choose one of {', '.join(FORMS)}")
    tokens = shape.batch * shape.heads * shape.n * shape.dim
    return Case(
        family=f"{form} forward+backward" if grad else form, shape=vars(shape).copy(), need=(120.0 if grad else 60.0) * tokens, grad=grad,
        build=partial(_build, form, shape, grad),
    )  # fmt: skip


def step_case(form: str, shape: Shape) -> Case:
    return Case(family=f"{form} one token", shape={**vars(shape)}, need=2e7, build=partial(_step, form, shape))


def cases(grid: str, cuda: bool) -> list[Case]:
    if not cuda:
        tiny, larger = [Shape(n, heads=2, dim=32) for n in (256, 512)], [Shape(n, heads=4, dim=64) for n in (1024, 4096, 8192)]
        shapes = tiny if grid == "quick" else larger
        return [*(case(form, x) for x in shapes for form in FORMS), case("gated delta", shapes[0], True)]
    if grid == "quick":
        return [*(case(form, Shape(8192)) for form in FORMS), *(case(form, Shape(131072)) for form in FORMS)]
    if grid == "bars":
        return [case(form, Shape(n), grad) for grad in (False, True) for n in (131072, 8192) for form in FORMS]
    return [
        *(case(form, Shape(n)) for n in (8192, 131072) for form in FORMS),
        *(case(form, Shape(8192), True) for form in FORMS),
        *(case(form, Shape(n)) for n in (2048, 32768) for form in FORMS),
        *(step_case(form, Shape(1, batch=64)) for form in ("scalar gate", "gated delta", "kda")),
        *(case(form, Shape(131072), True) for form in FORMS),
    ]
