"""A decoding step over encoded entries: they are read as they lie, and the device is asked for no value, so that it can be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.bench.case import Settings
from saccade.bench.step_cases import Layers
from saccade.bench.step_shapes import Shape, decoding
from saccade.cache import parted
from saccade.cache.codebook import SparseList
from saccade.cache.parted import Part, PartedSegment
from saccade.cache.stores import CodedStore, PlainStore

ONE_CALL = ["zipcache", "zipcache(salient_bits=16, other_bits=1)", "akvq-vl", "think"]
IN_PIECES = ["kvquant", "think(key_bits=4)", "cskv(bits=4)"]  # restored a piece at a time


class NothingMoves(TorchDispatchMode):
    """Refuses to bring tensors from the host to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_meta:
            assert not any(isinstance(x, Tensor) and x.ndim and not x.is_meta for x in args), f"{func} moves a tensor"
        return out


def without_data(value: Any, done: set[int]) -> Any:
    """All tensors on a device that has no values to give, but for the books of the host: they are int64, or of a sparse list."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.int64 else value.to("meta")
    if type(value) in (list, tuple):
        return type(value)(without_data(x, done) for x in value)
    if type(value) is dict:
        return {name: without_data(x, done) for name, x in value.items()}
    if type(value).__module__.startswith("saccade.") and hasattr(value, "__dict__") and id(value) not in done:
        done.add(id(value))
        books = {"_on_host"} if isinstance(value, SparseList) else set()
        value.__dict__.update({name: x if name in books else without_data(x, done) for name, x in vars(value).items()})
    return value


@torch.no_grad()
@pytest.mark.parametrize("spec", [*ONE_CALL, *IN_PIECES])
def test_a_step_asks_the_device_for_nothing(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers(decoding(spec), Shape(300, 2, 4, 2, 32, 2), Settings(device="cpu", dtype=torch.bfloat16))
    monkeypatch.setattr(parted, "runs_on", lambda _: True)  # as on a GPU
    held = [layers.caches, layers.token, layers.queries]
    layers.caches, layers.token, layers.queries = without_data(held, set())
    for kind, names in ((PartedSegment, ("read", "gather")), (Part, ("read_keys",)), (CodedStore, ("read",)), (PlainStore, ("read",))):
        for name in names if spec in ONE_CALL else ():
            monkeypatch.setattr(kind, name, _never)
    with NothingMoves():
        out = layers.step()
    assert out.is_meta and out.shape == (2, 4, 1, 32)


def _never(*_: object) -> None:
    raise AssertionError("entries were restored")
