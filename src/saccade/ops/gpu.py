"""What every Triton implementation asks before it runs: is Triton there, and can it run on these tensors."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

# looked up once, here: torch.compile of torch 2.11 does not trace find_spec
_FOUND = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton can be imported; it is not imported for that."""
    return _FOUND


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 in the environment."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def runs_on(x: Tensor) -> bool:
    """Whether `impl="auto"` picks Triton for this tensor: a CUDA tensor, and Triton there."""
    return x.is_cuda and has_triton()


def require_triton(op: str, x: Tensor) -> None:
    """Raises ValueError where `impl="triton"` was asked for and can't run on `x`."""
    if not has_triton():
        raise ValueError(f'{op}: impl "triton" was asked for and Triton is not installed: pip install triton, or use impl "auto"')
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f'{op}: impl "triton" was asked for on a {x.device.type} tensor: move it to a CUDA device, set TRITON_INTERPRET=1 '
            'before the first kernel runs, or use impl "auto"'
        )


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b cover a."""
    return -(-a // b)


def multiprocessors(x: Tensor) -> int:
    """How many programs run side by side on the device of `x`; some small number in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
