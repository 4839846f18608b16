"""KVLayer: the one cache layer, a transformers CacheLayerMixin.

A layer is a list of sealed segments, oldest first, and a growing full-precision tail. It knows the place in the sequence of every
entry, so its logical length (tokens seen) and its physical length (entries held) may differ after eviction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from saccade.cache.counted import CountedSegment
from saccade.cache.rows import empty_tail, joined, padded_tail, row_of, row_of_rectangle, rows_of_segments
from saccade.cache.segment import PackedSegment, Rectangle, Segment
from saccade.cache.slots import Slots
from saccade.cache.state import CallFacts, States
from saccade.cache.tail import Tail
from saccade.cache.window import Window
from saccade.parts.ragged import slots_of

_BOUND = ("before_append", "after_crop", "leader", "window")  # what ties a layer to an attached model and to its cache
VISION = "vision"  # the side array that is 1 for tokens of images and video


class KVLayer(CacheLayerMixin):
    """seen: tokens so far. before_append: called with the number of new tokens before they are stored; after_crop: after tokens
    were taken back (both set by the attached model, which decides when a cache policy acts).
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        self.before_append: Callable[[int], None] | None = None
        self.after_crop: Callable[[int], None] | None = None
        self.leader: KVLayer | None = None  # the layer of this cache that keeps the sequence's state, None for itself
        self.window: Window | None = None  # where recorded steps write, None where there are none
        self.rectangular = False  # the model itself reads all entries in one piece (latents), so rows are padded, not packed
        self.methods: dict[str, str] = {}  # phase to spec of the methods whose states these are
        self._clear()

    def _clear(self) -> None:
        self.facts: CallFacts | None = None
        self.segments: list[Segment] = []
        self.tail: Tail | None = None
        self.seen = 0
        self.states = States()
        self.pending = 0  # tokens of a prompt that a cache policy has not acted on yet
        self._padding: list[list[int]] = []  # places of padding per batch row, empty when there was none
        self._incoming: Tensor | None = None
        self._vision: Tensor | None = None
        self._places: tuple[Tensor, int, list[list[int]] | None, int] | None = None
        self._back: Tensor | None = None
        self.is_initialized = False

    def __deepcopy__(self, memo: dict[int, object]) -> KVLayer:
        """A copy of the contents that shares the sealed segments, which never change, so that requests can share a prefix.

        The callbacks belong to the attached model, which sets them again.
        """
        new = KVLayer()
        memo[id(self)] = new
        for name, value in vars(self).items():
            if name not in _BOUND:
                setattr(new, name, list(value) if name == "segments" else copy.deepcopy(value, memo))
        return new

    def stored_fields(self) -> dict[str, Any]:
        """The contents, to be saved."""
        return {**vars(self), **dict.fromkeys(_BOUND)}

    def use_methods(self, methods: dict[str, str]) -> None:
        """Forget the states of methods other than these (phase to spec): another method's index means nothing to them."""
        for phase in self.methods.keys() | methods.keys():
            if self.methods and self.methods.get(phase) != methods.get(phase):
                self.states.forget(phase)
                if phase == "decode":
                    self.states.forget("observed")
        self.methods = dict(methods)

    @classmethod
    def adopt(cls, layer: DynamicLayer, real: Tensor | None) -> KVLayer:
        """A KVLayer with the contents of a plain dynamic layer; real `(B, n)` bool or None tells padding."""
        new = cls()
        if layer.is_initialized and layer.keys is not None and layer.values is not None and layer.get_seq_length():
            new.expect(real)
            new.update(layer.keys, layer.values)
        return new

    def adopt_tail(self, other: KVLayer, room: int) -> None:
        """Read the entries of another layer where they lie, and count on from there (see `Tail.twin`)."""
        self.tail, self.seen = None if other.tail is None else other.tail.twin(room), other.seen
        self.dtype, self.device, self.is_initialized = other.dtype, other.device, True

    # -- transformers' interface -------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Full-precision keys `(B, H, n, D)`; None before the first token."""
        return None if self.tail is None else self.tail.keys

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Full-precision values `(B, H, n, Dv)`; None before the first token."""
        return None if self.tail is None else self.tail.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        positions = torch.empty(batch, heads, 0, dtype=torch.int32, device=key_states.device)
        self.tail = Tail(Rectangle(key_states[:, :, :0], value_states[:, :, :0], {"positions": positions}))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def expect(self, real: Tensor | None, vision: Tensor | None = None) -> None:
        """Which of the next tokens are not padding (None: all), and which stand for images or video (None: none): `(B, m)` bool."""
        self._incoming, self._vision = real, vision

    def place(self, places: Tensor, n: int, missing: list[list[int]] | None, run: int) -> None:
        """Where the next tokens stand in an input of n, `(B, m)` int32 ascending: the others of the n are counted as seen, not stored.

        missing: places of padding per row, None without padding. run: so many tokens at the end stand one after the other.
        """
        self._places = (places, n, missing, run)

    def incoming(self, m: int, device: torch.device) -> Tensor:
        """Places of the next m tokens, int32 `(B or 1, m)`."""
        if self._places is not None:
            return self._places[0] + self.seen
        return torch.arange(self.seen, self.seen + m, device=device, dtype=torch.int32).unsqueeze(0)

    def bring_back(self, places: Tensor) -> None:
        """The next tokens begin with r that were dropped, at `places (B, r)` int32: they join the entries, and are not new."""
        self._back = places

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values `(B, H, m, ...)`.

        Returns all entries where they lie in one rectangle, else only the new ones (attention then reads the segments itself).
        """
        if self.window is not None and self.window.running:
            self.window.take(key_states, value_states)
            self.count()
            return key_states, value_states
        if self.before_append is not None:
            self.before_append(key_states.shape[2] - (0 if self._back is None else self._back.shape[1]))
        if self._back is not None:
            key_states, value_states = self._insert(key_states, value_states)
        if self.tail is None:
            self.lazy_initialization(key_states, value_states)
        assert self.tail is not None
        m = key_states.shape[2]
        real, vision, placed = self._incoming, self._vision, self._places
        self._incoming = self._vision = self._places = None
        missing = None if real is None else [(self.seen + (~row).nonzero().flatten()).tolist() for row in real]
        missing = missing if placed is None else placed[2]
        if missing is not None:
            self.states.split(key_states.shape[0])
            self._padding = [a + b for a, b in zip(self._padding or [[]] * len(missing), missing, strict=True)]
        self.tail.append(key_states, value_states, self.seen if placed is None else (placed[0] + self.seen).unsqueeze(1), real)
        if placed is not None:
            self.seen, self.tail.fresh = self.seen + placed[1] - m, placed[3]
        if vision is not None:
            self.tail.mark(VISION, vision)
        self.seen += m
        return (self.tail.keys, self.tail.values) if self.plain else (key_states, value_states)

    def count(self, m: int = 1) -> None:
        """Count m tokens that steps have written to the window, or forget as many (m negative)."""
        assert self.tail is not None
        self.tail.count(m)
        self.seen += m

    def _insert(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the tokens that are back; returns what comes after them."""
        assert self._back is not None
        (places, self._back), real, opened, r = (self._back, None), self._incoming, [], self._back.shape[1]
        for row in self.rows():
            slots, mine = self.open(row), slice(None) if row is None else slice(row, row + 1)
            own = slice(r) if row is None or real is None else real[row, :r].nonzero().flatten()
            where = places[mine, own].unsqueeze(1).expand(-1, slots.heads, -1)
            slots.insert(keys[mine][:, :, own], values[mine][:, :, own], where)
            opened.append((row, slots))
        self.close(opened)
        self._incoming = None if real is None or bool(real[:, r:].all()) else real[:, r:]
        return keys[:, :, r:], values[:, :, r:]

    def get_seq_length(self) -> int:
        """Tokens seen; never the physical length."""
        return self.seen

    @property
    def physical(self) -> int:
        """Slots a query row of the longest head reads."""
        return sum(segment.length for segment in self.segments) + (0 if self.tail is None else self.tail.n)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical + query_length, self.seen - self.physical

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (a negative number, as in transformers >= 5)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is not supported: give the number of tokens to remove as a negative number")
        removed = min(int(-tokens_to_remove), self.seen)
        self.seen -= removed
        self._padding = [[place for place in row if place < self.seen] for row in self._padding]
        if removed and self.tail is not None:
            if removed <= self.tail.fresh:
                self.tail.truncate(self.tail.n - removed)
                self.tail.fresh -= removed
            else:
                self._drop_from(self.seen)
        if self.after_crop is not None:
            self.after_crop(removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tail is not None:
            self._take_rows(torch.arange(self.tail.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.tail is not None:
            self._take_rows(torch.arange(self.tail.keys.shape[0])[indices.cpu()])

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        raise ValueError("an attached model keeps its cache on one device: use a cache without offloading")

    prefetch = offload

    # -- reading -----------------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """All entries lie in the tail's rectangle."""
        return not self.segments

    @property
    def padded(self) -> bool:
        """Rows differ by padding, now or earlier: methods run row by row."""
        return self.states.rows is not None

    def rows(self) -> list[int | None]:
        """Which rows are run together: all at once (`[None]`), or one by one, so that each sees its own tokens only."""
        if self.states.rows is None and self.leader is not None and self.leader.states.rows is not None:
            self.states.split(self.leader.states.rows)
        return [None] if self.states.rows is None else list(range(self.states.rows))

    def sequence(self, row: int | None) -> dict[str, Any]:
        """State of the sequence that all layers share; `row` as for the states of this layer."""
        leader = self.leader or self
        if row is not None and leader.states.rows is None and self.states.rows is not None:
            leader.states.split(self.states.rows)
        return leader.states.get("sequence", row)

    def positions(self) -> Tensor:
        """`(B, H, n)` int32: where in the sequence the tail's entries stand."""
        if self.tail is None:
            raise ValueError("an empty cache layer has no positions: run the model first")
        return self.tail.side["positions"]

    def lengths(self) -> list[list[int]]:
        """Entries held per batch row and head, padding not counted."""
        if self.tail is None:
            return []
        batch, heads = self.tail.keys.shape[:2]
        real = self.tail.real
        own = [self.tail.n] * batch if real is None else real.sum(-1).tolist()
        counts = [[own[b]] * heads for b in range(batch)]
        for segment in self.segments:
            for index, row in enumerate(segment.lengths()):
                target = counts[index if segment.row is None else segment.row]
                target[:] = [a + b for a, b in zip(target, row, strict=True)]
        return counts

    def full_precision_lengths(self) -> list[int]:
        """Full-precision entries per batch row, of the longest head."""
        assert self.tail is not None
        batch = self.tail.keys.shape[0]
        real = self.tail.real
        own = [self.tail.n] * batch if real is None else real.sum(-1).tolist()
        for segment in self.segments:
            if isinstance(segment, PackedSegment):
                own = [n + max(row) for n, row in zip(own, segment.lengths(), strict=True)]
        return own

    def real_seen(self, row: int) -> int:
        """Tokens of one row so far, padding not counted."""
        return self.seen - len(self._padding[row]) if self._padding else self.seen

    def tail_row(self, row: int) -> Rectangle:
        """The tail's entries of one batch row, `(1, H, n, ...)`, padding left out."""
        assert self.tail is not None
        return row_of(self.tail, row)

    @property
    def kv_bytes(self) -> int:
        """Bytes of storage behind keys and values, spare room and code parameters included."""
        return sum(segment.kv_bytes for segment in self.segments) + (0 if self.tail is None else self.tail.kv_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes behind keys and values that were moved to the host's memory, not part of `kv_bytes`."""
        return sum(segment.host_bytes for segment in self.segments)

    @property
    def side_bytes(self) -> int:
        """Bytes of storage behind positions, scores and the methods' own state."""
        own = 0 if self.tail is None else self.tail.side_bytes
        return own + sum(segment.side_bytes for segment in self.segments) + self.states.nbytes

    # -- policies ----------------------------------------------------------------------------------------------------------

    def open(self, row: int | None = None) -> Slots:
        """The full-precision entries, for a policy: of all rows (only without padding) or of one row, padding left out."""
        assert self.tail is not None
        packed = next((s for s in self.segments if isinstance(s, PackedSegment)), None)
        if row is None and packed is None:
            return Slots.over(self.tail, self._counted(row))
        tail = row_of(self.tail, row or 0)
        return Slots(tail if packed is None else joined(packed.read_row(row or 0), tail), counted=self._counted(row))

    def _counted(self, row: int | None) -> CountedSegment | None:
        """What stands for dropped tokens, of all rows or of one."""
        found = next((s for s in self.segments if isinstance(s, CountedSegment) and s.row in (None, row)), None)
        return found if found is None or found.row == row else found.take_rows(torch.tensor([row]))

    def close(self, opened: list[tuple[int | None, Slots]]) -> None:
        """Store what policies made of the entries that `open` gave; untouched entries stay as they are."""
        assert self.tail is not None
        for row, slots in opened:
            for segment in slots.sealed:
                segment.row = row
                self.segments.append(segment)
        if any(slots.recounted for _, slots in opened):
            self.segments = [s for s in self.segments if not isinstance(s, CountedSegment)]
            self.segments += [slots.counted.bound_to(row) for row, slots in opened if slots.counted is not None]
        if not any(slots.moved for _, slots in opened):
            if opened[0][0] is None:
                self.tail.set_side(opened[0][1].side_changes)
                return
            if not any(slots.side_changes for _, slots in opened):
                return
            if self.plain:
                self.tail.set_side_by_row([slots.side_changes for _, slots in opened])
                return
        rows = [slots.rectangle for _, slots in opened]
        self.segments = [s for s in self.segments if not isinstance(s, PackedSegment)]
        if opened[0][0] is None and rows[0].valid is None:
            self.tail = opened[0][1].to_tail()
            return
        by_row = rows if opened[0][0] is not None else [row_of_rectangle(rows[0], b) for b in range(rows[0].keys.shape[0])]
        if self.rectangular:
            self.tail = padded_tail(by_row)
            return
        packed = PackedSegment.pack(by_row)
        self.segments.append(packed)
        self.states.split(len(by_row))
        self.tail = empty_tail(packed, len(by_row))

    # -- upkeep ------------------------------------------------------------------------------------------------------------

    def _take_rows(self, rows: Tensor) -> None:
        if self.tail is None:
            return
        self.segments = rows_of_segments(self.segments, rows)
        self.tail = self.tail.take_rows(rows)
        self.states.take_rows(rows)
        self._padding = [self._padding[row] for row in rows.tolist()] if self._padding else []

    def _drop_from(self, position: int) -> None:
        """Drop every entry of a token at or after `position`, wherever it is stored."""
        assert self.tail is not None
        self.segments = [kept for s in self.segments if (kept := s.before(position)).length]
        stays = self.tail.side["positions"] < position
        counts = stays.sum(-1)
        if bool((counts == counts.flatten()[0]).all()) and self.tail.real is None:
            slots = self.open() if self.plain else Slots(Rectangle(self.tail.keys, self.tail.values, self.tail.side))
            slots.keep(slots_of(stays)[0])
            self.tail = Tail(slots.rectangle)
            return
        opened: list[tuple[int | None, Slots]] = []
        for row in range(stays.shape[0]):
            slots = self.open(row)
            here = slots.side["positions"] < position
            slots.keep(*slots_of(here if slots.valid is None else here & slots.valid))
            opened.append((row, slots))
        self.close(opened)
