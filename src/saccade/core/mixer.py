"""Mixers: trainable layers that mix tokens, and the state they carry from token to token.

A `Mixer` is a method like all others, a frozen dataclass of hyper-parameters, with one hook: `build(shape)` makes the layer, a
`TokenMixer`. A TokenMixer has three forms that agree: `naive` (the definition, written out over the whole sequence), `forward` over
many tokens, and `forward` token by token with the state that the call before returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.core.method import Method

Causality = Literal["causal", "streaming", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Sizes a mixer is built for.

    dim: channels of the tokens. heads: query heads. kv_heads: key/value heads (default: heads). head_dim: channels of a head (default:
    dim / heads). layer, layers: index of the layer and number of layers, for what changes with depth. max_length: the longest
    sequence, for methods whose parameters have one row per position; None where none was given.
    """

    dim: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    layer: int = 0
    layers: int = 1
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads equally: make kv_heads a divisor of heads")
        if not self.head_dim:
            if self.dim % self.heads:
                raise ValueError(f"dim={self.dim} cannot be split among {self.heads} heads: make it a multiple, or give head_dim")
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim}: give at least 1")
        if not 0 <= self.layer < self.layers:
            raise ValueError(f"layer={self.layer} is not among the layers 0 ... {self.layers - 1}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: give at least 1, or None")


class MixerState:
    """What a mixer keeps of the tokens so far.

    position: `(B,)` int64, the real tokens of each row so far. values: named tensors with the batch first; dicts of such (the branches
    of a mixer made of several); or stores, objects that offer `reorder(rows)`, `copy()`, `crop(n)`, `joined(stores)` and `nbytes`.
    A state belongs to the call it is given to: stores may change in place, so `copy()` what is needed again.
    """

    def __init__(self, position: Tensor, values: Mapping[str, Any]) -> None:
        self.position = position
        self.values = dict(values)

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes behind everything that is kept."""
        return _bytes(self.values) + self.position.numel() * self.position.element_size()

    def reorder(self, rows: Tensor) -> MixerState:
        """The state of these batch rows, which may repeat or leave out some: `rows (B',)` int64."""
        return self._each(lambda x: x.index_select(0, rows.to(x.device)), lambda store: store.reorder(rows))

    def repeat(self, times: int) -> MixerState:
        """Every row so many times, one after the other."""
        return self.reorder(torch.arange(self.batch).repeat_interleave(times))

    def copy(self) -> MixerState:
        """The same again, apart from this one."""
        return self._each(lambda x: x.clone(), lambda store: store.copy())

    def detach(self) -> MixerState:
        """The same without its history, where gradients shall stop."""
        return self._each(lambda x: x.detach(), lambda store: store)

    @property
    def stores(self) -> bool:
        """Whether something is kept that changes in place."""
        return _stores(self.values)

    @property
    def croppable(self) -> bool:
        """Whether tokens can be taken back: only if nothing but stores of single tokens is kept."""
        return _croppable(self.values)

    def crop(self, n: int) -> MixerState:
        """The state before the last n tokens of every row. ValueError where they can't be told apart any more."""
        if n < 0:
            raise ValueError(f"crop({n}): give the number of tokens to take back, at least 0")
        if n == 0:
            return self
        if not self.croppable:
            raise ValueError(
                f"a recurrent state can't be taken back by {n} tokens, they are summed up in it: keep a copy() of the state before them"
            )
        new = self._each(lambda x: x, lambda store: store.crop(n))
        new.position = (self.position - n).clamp(min=0)
        return new

    @staticmethod
    def join(states: Sequence[MixerState]) -> MixerState:
        """One state of the rows of several, in order. ValueError when they are of different mixers."""
        return MixerState(torch.cat([state.position for state in states]), _join([state.values for state in states]))

    def _each(self, tensor: Callable[[Tensor], Tensor], store: Callable[[Any], Any]) -> MixerState:
        return MixerState(tensor(self.position), _map(self.values, tensor, store))


def _map(values: Mapping[str, Any], tensor: Callable[[Tensor], Tensor], store: Callable[[Any], Any]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensor(value)
        return _map(value, tensor, store) if isinstance(value, dict) else store(value)

    return {name: one(value) for name, value in values.items()}


def _bytes(values: Mapping[str, Any]) -> int:
    total = 0
    for value in values.values():
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        else:
            total += _bytes(value) if isinstance(value, dict) else value.nbytes
    return total


def _croppable(values: Mapping[str, Any]) -> bool:
    return all(not isinstance(x, Tensor) and (not isinstance(x, dict) or _croppable(x)) for x in values.values())


def _stores(values: Mapping[str, Any]) -> bool:
    return any(_stores(x) if isinstance(x, dict) else not isinstance(x, Tensor) for x in values.values())


def _join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = parts[0]
    if any(part.keys() != first.keys() for part in parts):
        raise ValueError(f"states with {sorted(first)} and others can't be joined: they are of different mixers")
    joined: dict[str, Any] = {}
    for name, value in first.items():
        found = [part[name] for part in parts]
        if isinstance(value, Tensor):
            joined[name] = torch.cat(found)
        else:
            joined[name] = _join(found) if isinstance(value, dict) else value.joined(found)
    return joined


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The real tokens of every row moved to its front, in their order, so that they follow what was kept of the tokens before.

    valid: `(B, N)` bool, False at padding. order: `(B, N)` int64, the tokens of each row in their new order. lengths: `(B,)` int64, real
    tokens of each row.
    """

    valid: Tensor
    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, valid: Tensor | None) -> Alignment | None:
        """None when there is no padding."""
        if valid is None or bool(valid.all()):
            return None
        return cls(valid=valid, order=torch.sort((~valid).to(torch.uint8), dim=1, stable=True).indices, lengths=valid.sum(-1))

    def align(self, x: Tensor) -> Tensor:
        """x `(B, N, C)` in the new order."""
        return x.gather(1, self._wide(x))

    def back(self, y: Tensor) -> Tensor:
        """y `(B, N, C)` in the old order, 0 at padding."""
        return torch.zeros_like(y).scatter(1, self._wide(y), y).masked_fill(~self.valid.unsqueeze(-1), 0.0)

    def _wide(self, x: Tensor) -> Tensor:
        return self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Call:
    """The facts of one call of a mixer.

    positions: `(B, N)` int64, where the tokens stand (for rotary embeddings and the like). start: `(B,)` int64, real tokens before
    this call. lengths: `(B,)` int64, in row b only the first lengths[b] of the N tokens are real; None: all are.
    keep: whether the state after the call is wanted. layers: what the layers of one forward pass leave for later ones, by layer number.
    """

    positions: Tensor
    start: Tensor
    lengths: Tensor | None = None
    keep: bool = True
    layers: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, start: Tensor, n: int, positions: Tensor | None, rows: Alignment | None, *, keep: bool) -> Call:
        """The facts of a call of n tokens behind `start` others; positions `(B or 1, n)` as they were given, or None."""
        if positions is None:
            places = start[:, None] + torch.arange(n, device=start.device)
        else:
            places = positions.expand(start.shape[0], n)
            places = places if rows is None else places.gather(1, rows.order)
        return cls(positions=places, start=start, lengths=None if rows is None else rows.lengths, keep=keep)

    @property
    def real(self) -> Tensor | None:
        """`(B, N)` bool, or None when all tokens are real."""
        if self.lengths is None:
            return None
        return torch.arange(self.positions.shape[1], device=self.positions.device) < self.lengths[:, None]

    def masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """x `(B, H, N, ...)` with `fill` at the tokens that are not real."""
        if self.real is None:
            return x
        return x.masked_fill(~self.real.reshape(self.real.shape[0], 1, -1, *(1,) * (x.ndim - 3)), fill)

    @property
    def ends(self) -> Tensor:
        """`(B,)` int64: real tokens after this call."""
        return self.start + (self.positions.shape[1] if self.lengths is None else self.lengths)


class TokenMixer(nn.Module, ABC):
    """A layer over tokens `(B, N, dim)`. Subclasses write `mix` and `naive`.

    causality: that of the method. batches_padding: whether `mix` takes rows of different lengths, reading `call.lengths`, and rows that
    have come to different places, `call.start`; where it does not, such rows are run one by one, each without its padding.
    """

    causality: Causality = "causal"
    batches_padding: bool = False
    dim: int

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.shape = shape
        self.dim = shape.dim

    @abstractmethod
    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        """(y `(B, N, dim)`, what to keep) of x `(B, N, dim)`; past: what was kept before, empty at the start.

        In a padded batch the real tokens of each row come first, so that they follow what was kept; y of the others may be anything.
        """

    @abstractmethod
    def naive(self, x: Tensor) -> Tensor:
        """y `(B, N, dim)` of a whole sequence by the paper's definition, with all N x N weights written out: the oracle of `forward`."""

    def forward(
        self, x: Tensor, state: MixerState | None = None, *, positions: Tensor | None = None, valid: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, MixerState | None]:  # fmt: skip
        """(y `(B, N, dim)`, the state after the last token) of x `(B, N, dim)`.

        state: what the call before returned; the call takes it over. positions: `(B or 1, N)` int64 where the tokens stand (default:
        they go on from the tokens before). valid: `(B, N)` bool, False at padding, wherever it stands: such tokens change nothing, and
        their y is 0. keep: False returns None for the state (training).
        Raises ValueError or TypeError for tensors that don't fit, and for a state given to a bidirectional mixer.
        """
        self._check(x, state, positions, valid)
        start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if state is None else state.position
        rows = Alignment.of(valid)
        call = Call.at(start, x.shape[1], positions, rows, keep=keep)
        y, after = self.run(x if rows is None else rows.align(x), state, call)
        return y if rows is None else rows.back(y), after

    def run(self, x: Tensor, state: MixerState | None, call: Call) -> tuple[Tensor, MixerState | None]:
        """`forward` of tokens that were checked and, where there is padding, aligned."""
        past = {} if state is None else state.values
        keep = call.keep and self.causality != "bidirectional"
        if not self.batches_padding and (call.lengths is not None or (past and bool((call.start != call.start[0]).any()))):
            return self._row_by_row(x, past, call, keep)
        y, kept = self.mix(x, past, call)
        return y, MixerState(call.ends, kept) if keep else None

    def _row_by_row(self, x: Tensor, past: Mapping[str, Any], call: Call, keep: bool) -> tuple[Tensor, MixerState | None]:
        before = MixerState(call.start, past)
        lengths = [x.shape[1]] * x.shape[0] if call.lengths is None else call.lengths.tolist()
        outs, states = [], []
        for row, n in enumerate(lengths):
            own = before.reorder(torch.tensor([row]))
            y = torch.zeros_like(x[row : row + 1])
            if n:
                one = Call(positions=call.positions[row : row + 1, :n], start=own.position, keep=call.keep)
                found, kept = self.mix(x[row : row + 1, :n], own.values, one)
                y = torch.cat([found.to(y.dtype), y[:, n:]], dim=1)
                own = MixerState(one.ends, kept)
            elif keep and not past:
                raise ValueError(f"row {row} of the batch has no real token to start with: leave the row out, or feed its first tokens too")
            outs.append(y)
            states.append(own)
        return torch.cat(outs), MixerState.join(states) if keep else None

    def whole(self, x: Tensor) -> Call:
        """The facts of a call over a whole sequence without padding, for `naive`."""
        start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return Call(positions=start[:, None] + torch.arange(x.shape[1], device=x.device), start=start, keep=False)

    def _check(self, x: Tensor, state: MixerState | None, positions: Tensor | None, valid: Tensor | None) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor (B, N, {self.dim}), not {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 3 or x.shape[-1] != self.dim or min(x.shape) < 1:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, N, {self.dim}) with at least one token")
        if state is not None:
            if self.causality == "bidirectional":
                raise ValueError("a bidirectional mixer reads the whole sequence at once and has no state: call it without one")
            if not isinstance(state, MixerState):
                raise TypeError(f"state must be what the call before returned, not a {type(state).__name__}")
            if state.batch != x.shape[0]:
                raise ValueError(f"the state has {state.batch} rows and x has {x.shape[0]}: use reorder or repeat to bring them together")
        if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != tuple(x.shape[:2])):
            raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}: expected bool {tuple(x.shape[:2])}")
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != x.shape[1] or positions.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"positions has shape {tuple(positions.shape)}: expected ({x.shape[0]} or 1, {x.shape[1]})")


@dataclass(frozen=True, kw_only=True)
class Mixer(Method):
    """A trainable token mixer: hyper-parameters, and the layer they describe. `Info.causality` says what it may see."""

    @abstractmethod
    def build(self, shape: MixerShape) -> TokenMixer:
        """The layer for this shape. ValueError where the fields and the shape don't fit."""

    def module(self, shape: MixerShape) -> TokenMixer:
        """The layer for this shape, which knows the method's causality."""
        made = self.build(shape)
        made.causality = self.info.causality
        return made
