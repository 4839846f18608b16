"""Whether a function of quant runs its kernel or the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.gpu import require_triton, runs_on

NARROW = (torch.float32, torch.float16, torch.bfloat16)  # what kernels calculate with


def kernel_asked(op: str, impl: str, x: Tensor) -> bool:
    """Whether `impl` asks for a kernel on x: "triton" does, "auto" on a GPU outside of torch.compile. Raises ValueError for another
    impl, and for "triton" where it can't run."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl {impl!r} is not one of auto, torch, triton")
    if impl == "triton":
        require_triton(op, x)
    return impl == "triton" or (impl == "auto" and runs_on(x) and not torch.compiler.is_compiling())


def kernel_takes(op: str, impl: str, fits: bool, takes: str) -> bool:
    """Whether the call fits the kernel that was asked for; raises ValueError, naming what it takes, where "triton" was asked for."""
    if impl == "triton" and not fits:
        raise ValueError(f'{op}: impl "triton" takes {takes}; use impl "auto"')
    return fits


def narrow(*tensors: Tensor) -> bool:
    """Whether these are of dtypes that kernels calculate with, on one device and without gradients."""
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not gradients and all(x.dtype in NARROW and x.device == tensors[0].device for x in tensors)
