"""Plain calls go around the op, everything that looks on meets it, and both give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.ops.routes import routed, unwatched

RAN: list[str] = []


def double(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    RAN.append(type(x).__name__)
    return x * factor, x.sum(-1)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def gradients(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    found = torch.zeros_like(x) if dy is None else dy * ctx.factor
    return found if dsum is None else found + dsum.unsqueeze(-1), None


op = torch.library.custom_op("saccade_tests::double", mutates_args=(), schema="(Tensor x, float factor) -> (Tensor, Tensor)")(double)
op.register_fake(lambda x, factor: (x.new_empty(x.shape), x.new_empty(x.shape[:-1])))
op.register_autograd(gradients, setup_context=keep)
run = routed(op, double, keep, gradients)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_op_and_a_plain_call_has_none() -> None:
    x = torch.randn(3, 4)
    assert unwatched(x, None, 2.0, torch.nn.Parameter(x))
    with Seen() as seen:
        assert not unwatched(x)
        found = run(x, 2.0)
    assert "saccade_tests::double" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(found, run(x, 2.0), strict=True))


def test_gradients_are_those_of_the_op() -> None:
    for which in ((0,), (1,), (0, 1)):
        results = []
        for call in (run, op):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
            out = call(x, 3.0)
            results.append(torch.autograd.grad([out[i].square().sum() for i in which], x)[0])
        assert torch.equal(*results)
    x = torch.randn(3).requires_grad_()
    (once,) = torch.autograd.grad(run(x, 2.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        once.sum().backward()
    with torch.no_grad():
        assert not run(x, 2.0)[0].requires_grad


def test_fake_tensors_transforms_and_compilers_take_the_op() -> None:
    RAN.clear()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(2, 3))
        assert run(fake, 2.0)[1].shape == (2,)
    assert not unwatched(fake) and RAN == []
    watched: list[bool] = []
    torch.func.vmap(lambda x: (watched.append(unwatched(x)), x)[1])(torch.randn(2, 3))
    assert watched == [False]
    compiled = torch.compile(lambda x: run(x, 2.0)[0] + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, x * 2 + 1) and torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((2, 3), 2.0))
