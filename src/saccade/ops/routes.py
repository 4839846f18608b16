"""Two routes to a kernel: as an op of torch.library, which compilers, transforms and modes see as one, or as the Python function it is.

What the op adds to a call, wrapping, dispatch and a generic backward node, costs the host as much again as all else it does where gradients
are wanted (`benchmarks/host.py` measures both). A call that nobody looks at goes without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TENSORS = (Tensor, torch.nn.Parameter)


def unwatched(*given: Any) -> bool:
    """Whether a call with these arguments is plain eager PyTorch: not compiled, no transform, no mode, no subclass of tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(x) in _TENSORS for x in given if isinstance(x, Tensor))


def routed(
    op: Callable[..., Any], function: Callable[..., Any], keep: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """A function that takes the arguments of `op` by position and goes the shorter way where it can.

    function: what the op runs. keep, gradients: what the op was given by `register_autograd`, as `setup_context` and `backward`.
    """
    direct = function if keep is None or gradients is None else _differentiable(function, keep, gradients)

    def run(*args: Any) -> Any:
        return (direct if unwatched(*args) else op)(*args)

    return run


def _differentiable(
    function: Callable[..., Any], keep: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:  # fmt: skip
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            out = function(*args)
            ctx.set_materialize_grads(False)
            keep(ctx, args, out)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, *grads)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return Direct.apply(*args)
        return function(*args)

    return run
