"""conv: short depthwise causal convolutions over tokens.

    y_t = act(sum_j w_j x_{t - width + 1 + j} + b)        act: silu or nothing; inputs before the first are the tail's, or zeros

Implementations: `reference` (tap by tap: the oracle), `conv1d` (torch's own convolution: the CPU path), `triton` (GPU: x is read once
and y written once, whatever lies between) and `step` (one token). All are differentiable.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saccade.ops.conv import conv1d, reference
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note
from saccade.ops.routes import unwatched

Impl = Literal["auto", "reference", "conv1d", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "conv1d", "triton")

__all__ = ["IMPLEMENTATIONS", "Impl", "short_conv"]


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    activation: str | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The convolution above of x `(B, N, C)`, every channel with its own `width` weights; token t reads itself and what came before.

    weight: `(C, width)`, the token's own weight last. bias: `(C,)`. Either may be of another floating dtype than x. tail: the inputs
    before x, `(B, width - 1, C)`, taken in the dtype of x; None: zeros. activation: "silu" or None.
    x may lie in memory as it likes; where channels are side by side no copy is made. Under autocast x takes its dtype.
    impl: "auto" takes Triton for CUDA tensors and "conv1d" otherwise; one token goes to "step" unless a single kernel can do it.
    `saccade.last_run()` says what ran.

    Returns y `(B, N, C)` in the dtype of x. Triton sums in float32 and rounds once.
    Raises ValueError or TypeError on shapes, dtypes or devices that don't fit, and when the named `impl` can't run the call.
    """
    _check(x, weight, bias, tail, activation)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if tail is not None:
        tail = None if weight.shape[1] == 1 else tail.to(x.dtype)
    name, y = _run(x, weight, bias, tail, activation == "silu", impl)
    if not torch.compiler.is_compiling():
        _note(name, x)
    return y


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool, impl: str) -> tuple[str, Tensor]:
    if impl == "reference":
        return "reference", reference.short_conv(x, weight, bias, tail, silu)
    if impl == "triton":
        require_triton("short_conv", x)
    one = impl == "auto" and x.shape[1] == 1
    if impl == "triton" or (impl == "auto" and runs_on(x) and (not one or _unseen(x, weight, bias, tail))):
        from saccade.ops.conv import triton as kernels

        why_not = kernels.refusal(x, weight, bias)
        if why_not is None:
            return "triton", kernels.short_conv(x, weight, bias, tail, silu)
        if impl == "triton":
            raise ValueError(why_not)
    if one:
        return "step", conv1d.step(x, weight, bias, tail, silu)
    return "conv1d", conv1d.short_conv(x, weight, bias, tail, silu)


def _unseen(*given: Tensor | None) -> bool:
    """Whether neither gradients nor a tracer want to see what is done with these tensors."""
    return unwatched(*given) and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str | None) -> None:
    given = {"x": x, "weight": weight, "bias": bias, "tail": tail}
    for name, value in given.items():
        if value is None and name in ("bias", "tail"):
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"short_conv: {name} is {what}: give a tensor of floating-point numbers")
        if value.device != x.device:
            raise ValueError(f"short_conv: {name} is on {value.device} and x on {x.device}: move them to one device")
    if x.ndim != 3:
        raise ValueError(f"short_conv: x has shape {tuple(x.shape)}: give (B, N, C), tokens before channels")
    batch, _, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"short_conv: weight has shape {tuple(weight.shape)}: x has {channels} channels, give ({channels}, width)")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"short_conv: bias has shape {tuple(bias.shape)}: x has {channels} channels, give ({channels},)")
    before = (batch, weight.shape[1] - 1, channels)
    if tail is not None and tail.shape != before:
        raise ValueError(f"short_conv: tail has shape {tuple(tail.shape)}: give {before}, the inputs that the first token still reads")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation {activation!r} is not known: use 'silu' or None")


def _note(name: str, x: Tensor) -> None:
    n = x.shape[1]
    note(LastRun(
        op="short_conv", impl=name, n_q=n, n_k=n, heads=x.shape[2], device=str(x.device), dtype=str(x.dtype).removeprefix("torch."),
    ))  # fmt: skip
