"""Kernels watched in the interpreter: every address that is read or written belongs to a tensor the kernel was given.

A GPU stops the whole process where memory that nobody has is read, or, worse, doesn't; the interpreter reads what happens to lie there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from saccade.ops.gpu import interpreting


class OutsideError(AssertionError):
    """An access to memory that no argument of the kernel has."""


def tensors(given: Any) -> Iterator[torch.Tensor]:
    """Those among the arguments of a kernel, in tuples and behind descriptors too."""
    for x in given:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from tensors(x)
        elif hasattr(x, "base"):
            yield from tensors([x.base])


@contextmanager
def watched() -> Iterator[list[int]]:
    """Raises OutsideError (inside the interpreter's own error) for accesses outside; yields a list to which each access adds its size."""
    assert interpreting(), "kernels are watched in the interpreter: set TRITON_INTERPRET=1"
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    executor = interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    ranges: list[tuple[int, int]] = []
    seen: list[int] = []

    def check(ptrs: Any, mask: Any, size: int) -> None:
        there = np.broadcast_to(np.asarray(mask.data), np.shape(ptrs.data)).astype(bool)
        at = np.asarray(ptrs.data)[there].astype(np.int64)
        if not at.size:
            return
        inside = np.zeros(at.shape, bool)
        for begin, end in ranges:
            inside |= (at >= begin) & (at + size <= end)
        seen.append(at.size)
        if not inside.all():
            near = min((int(at[~inside][0]) - begin for begin, _ in ranges), key=abs)
            raise OutsideError(f"{int((~inside).sum())} of {at.size} accesses lie outside, the first {near} bytes from a tensor's start")

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(ptrs, mask, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest, **options)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(ptrs, mask, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest, **options)

    def watched_call(self: Any, *args: Any, **options: Any) -> Any:
        ranges[:] = [
            (x.untyped_storage().data_ptr(), x.untyped_storage().data_ptr() + x.untyped_storage().nbytes())
            for x in tensors((*args, *options.values()))
        ]  # fmt: skip
        return call(self, *args, **options)

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = watched_load, watched_store, watched_call
    try:
        yield seen
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call
