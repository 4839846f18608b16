"""The words of a benchmark: a case, the contestants of a case, and what each of them has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Role = Literal["ours", "dense", "peer"]


class Skip(Exception):
    """A contestant or a case can't run here, and why: one sentence without a full stop."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """device: "cpu" or "cuda...". impl: what saccade's own calls ask for. budget_ms: time spent on the repeats of a contestant.
    limit_s: no contestant is begun after so many seconds."""

    device: str
    dtype: torch.dtype
    impl: str = "auto"
    budget_ms: float = 100.0
    limit_s: float = 55.0

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers, made on the device."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype, generator=generator or self.generator())


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be done at least: floating-point operations, bytes read and written, and which of them limits (`unit`)."""

    flops: float | None
    bytes: float | None
    unit: Literal["FLOP", "byte"]

    @property
    def amount(self) -> float:
        return float((self.flops if self.unit == "FLOP" else self.bytes) or 0.0)

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte."""
        return self.flops / self.bytes if self.flops and self.bytes else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """call: what is timed. outputs: the tensors that are judged, from what the call returned. impl: what ran, asked after a call."""

    call: Callable[[], Any]
    outputs: Callable[[Any], tuple[Tensor, ...]] = lambda raw: (raw,)
    impl: Callable[[], str] | str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """make: prepares what is not timed and gives the Run; raises Skip where it can't. role: "ours", "dense" (what ratios are taken
    against) or "peer" (the same work, done by others). checked: whether its outputs are those of the case's check.
    select: choosing what to read, timed apart. ahead_ms: on a GPU, how long it is kept busy before the clock starts, so that all launches
    are queued and its work alone is timed; 0 for the time a user waits. shared: what it works on, where that is the same in several cases
    of a run: it is timed in the first of them."""

    name: str
    role: Role
    work: Work
    make: Callable[[], Run]
    checked: bool = True
    select: Callable[[], object] | None = None
    ahead_ms: float = 0.0
    shared: str | None = None


class Check(Protocol):
    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        """(error, what is allowed): relative L2 distances."""
        ...


@dataclass(frozen=True, kw_only=True)
class Field:
    """A case with its tensors made: the contestants, the check of their results, and the density of what is read."""

    contestants: list[Contestant]
    check: Check | None = None
    density: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """family: the kind of problem; cases of a family that differ in "n" alone show growth. shape: what identifies the case.
    need: bytes of memory it takes, about. build: makes the tensors. grad: it times backward passes too."""

    family: str
    shape: dict[str, Any]
    need: float
    build: Callable[[Settings], Field] = field(repr=False)
    grad: bool = False

    @property
    def label(self) -> str:
        return f"{self.family} " + " ".join(f"{key} {value}" for key, value in self.shape.items() if value is not None)
