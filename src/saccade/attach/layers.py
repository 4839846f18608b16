"""One managed layer: how prefill, decode and cache methods act on each of its attention calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.attach.context import layer_context
from saccade.attach.layercall import LayerCall, between_calls, row_of_call, rows_of, scatter
from saccade.attach.reading import beside, by_row, read_segment, read_tail, reading_encoded, tail_weights
from saccade.attach.stats import LayerStats
from saccade.cache import CallFacts, KVLayer, PackedSegment, Segment, Slots
from saccade.cache.mixed import MixedEntries, ragged_rows
from saccade.cache.window import Window
from saccade.core import CachePolicy, Decode, HeadLayout, LayerContext, Phase, Plan, Prefill, Rotary, Selection, merge
from saccade.parts.merging import LOG_WEIGHT

STEP_QUERIES = 16  # calls of up to this many queries on a filled cache are decoding (single steps or verified guesses)


@dataclass(kw_only=True)
class LayerRunner:
    layer: int
    layers: int
    prefill: Prefill | None
    decode: Decode | None
    policy: CachePolicy | None
    plans: dict[str, Plan]
    when: str
    impl: str
    seed: int
    rotary: Rotary | None = None
    stats: LayerStats = field(default_factory=LayerStats)

    # -- one attention call ------------------------------------------------------------------------------------------------

    def run(self, call: LayerCall, layer: KVLayer | None) -> Tensor:
        """Attention output `(B, Hq, m, Dv)`; the new tokens are already stored."""
        if layer is not None and layer.window is not None and layer.window.running:
            return self._in_window(call, layer, layer.window)
        if layer is not None and call.again is not None:
            again, new = call.parted()
            return torch.cat([self._run_again(again, layer), self.run(new, layer)], dim=2)
        if layer is None:
            rows = rows_of(call.q.shape[0], call.real is not None)
            parts = [self._without_cache(call, row) for row in rows]
        else:
            layer.facts = CallFacts(layout=HeadLayout.of(call.q, call.k, call.v), scale=call.scale, softcap=call.softcap)
            if self._over_encoded(layer) and ragged_rows(layer.segments):
                # a decode method meets equally many entries of every row it is given
                layer.states.split(call.q.shape[0])
            rows = layer.rows()
            parts = [self._with_cache(call, layer, row) for row in rows]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        if layer is not None:
            self._after(call, layer, rows)
            self.note_sizes(layer)
        return out

    def _without_cache(self, call: LayerCall, row: int | None) -> Tensor:
        q, k, v, real = row_of_call(call, row)
        ctx = self._context(call, row, None, seen=k.shape[2], phase="prefill")
        out = self._many(ctx, q, k, v, [])
        return scatter(out, real, call.q.shape[2])

    def _with_cache(self, call: LayerCall, layer: KVLayer, row: int | None) -> Tensor:
        q, _, _, real = row_of_call(call, row, queries_only=True)
        m = q.shape[2]
        if m == 0:
            return call.q.new_zeros(1, call.q.shape[1], call.q.shape[2], call.v.shape[-1])
        owner = self.policy is not None and self.policy in (self.prefill, self.decode)  # of the sealed segments
        if row is not None and (owner or self._over_encoded(layer)):
            layer.segments = by_row(layer.segments, len(layer.lengths()))
        segments = [s for s in layer.segments if s.row is None or s.row == row]
        k, v = self._entries(call, layer, row)
        first = layer.physical == call.q.shape[2]
        phase: Phase = "prefill" if first or call.q.shape[2] > STEP_QUERIES else "decode"
        ctx = self._context(call, row, layer, seen=layer.seen, phase=phase)
        method = self.decode if phase == "decode" else self.prefill
        packed = [s for s in segments if not s.encoded]
        if method is not None and method == self.policy and method.info.ragged:
            # heads that hold different numbers of entries are this method's own doing: it reads them as they lie
            segments = [s.of_row(row or 0) if isinstance(s, PackedSegment) else s for s in segments]
        elif method is not None and row is not None and packed and (
            owner or len(packed) == len(segments) or (phase == "decode" and self._over_encoded(layer))
        ):
            # a method picks single entries, so ragged storage is laid out as one rectangle for it (a copy)
            joined = layer.open(row)
            if joined.valid is not None:
                raise ValueError(f"{method.info.slug} needs heads that hold equally many entries, which this cache policy does not keep")
            k, v, segments = joined.keys, joined.values, [s for s in segments if s.encoded]
        few = phase == "decode"
        weights = tail_weights(layer, row)
        if few and self.decode is not None and layer.tail is not None and LOG_WEIGHT in layer.tail.side:
            slug = self.decode.info.slug
            raise ValueError(f"{slug} reads entries that stand for several tokens as if each were one: leave count weights off")
        out = self._few(ctx, layer, q, k, v, segments, row, weights) if few else self._many(ctx, q, k, v, segments, row, weights)
        return scatter(out, real, call.q.shape[2])

    def _run_again(self, call: LayerCall, layer: KVLayer) -> Tensor:
        """Tokens that were dropped and are back: each attends to all entries up to its own place."""
        assert call.again is not None
        wide, parts = self._wide(call, layer), []
        for row in layer.rows():
            self._forget_index(layer, row)
            slots = self._open(layer, row, wide)
            q, *_, real = row_of_call(call, row, queries_only=True)
            places = call.again if row is None else call.again[row : row + 1]
            places = places if real is None else places[:, real]
            positions = slots.side["positions"].long()
            if slots.valid is not None:
                positions = positions.masked_fill(~slots.valid, layer.seen)
            ctx = self._context(call, row, layer, seen=layer.seen, phase="decode")
            if q.shape[2]:
                out = ctx.attend(q, slots.keys, slots.values, None, q_positions=places.unsqueeze(1), k_positions=positions)
            else:
                out = q.new_zeros(*q.shape[:3], slots.values.shape[-1])
            parts.append(scatter(out, real, call.q.shape[2]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _entries(self, call: LayerCall, layer: KVLayer, row: int | None) -> tuple[Tensor, Tensor]:
        """Full-precision entries of the tail as attention sees them, without padding."""
        assert layer.tail is not None
        if row is None:
            latent = layer.plain and call.k.shape[1:] != layer.tail.keys.shape[1:]
            return (call.k, call.v) if latent else (layer.tail.keys, layer.tail.values)
        mine, real = slice(row, row + 1), layer.tail.real
        if layer.plain and call.k.shape[1:] != layer.tail.keys.shape[1:]:
            k, v = call.k[mine], call.v[mine]
            return (k, v) if real is None else (k[:, :, real[row]], v[:, :, real[row]])
        part = layer.tail_row(row)
        return part.keys, part.values

    def _many(
        self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], row: int | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A prompt, a chunk of one, or a later turn."""
        own = self.prefill is not None and self.prefill == self.policy and q.shape[2] > 1
        if (segments or weights is not None) and not own:
            parts = [read_segment(s, q, row, ctx) for s in segments]
            parts.append(read_tail(ctx, q, k, v, weights, return_lse=True))
            self._count(self.stats.prefill, None, q.shape[2], k.shape[2], ctx.seen, sum(s.length for s in segments))
            return merge(*parts).out
        # a method may attend in several passes: what dense attention would have computed counts once
        self.stats.prefill.add(0, _visible(q.shape[2], ctx.seen))
        if self.prefill is None or q.shape[2] == 1:
            return ctx.attend(q, k, v, None)
        return self.prefill.attend(replace(ctx, segments=segments), q, k, v)

    def _few(
        self, ctx: LayerContext, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], row: int | None,
        weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Decoding: single steps, or a few guessed tokens to be verified, each handled as if it had come alone."""
        m, n = q.shape[2], k.shape[2]
        mixed = self.decode is not None and bool(segments) and self.decode != self.policy
        if mixed and self.decode is not None and not self.decode.info.reads_encoded:
            raise ValueError(
                f"{self.decode.info.slug} reads keys in full precision, and this cache holds encoded ones: leave it out for this cache"
            )
        if self.decode is None:
            sealed = sum(s.length for s in segments)
            parts = [read_segment(s, q, row, ctx) for s in segments]
            if not segments or n:
                parts.append(read_tail(ctx, q, k, v, weights, return_lse=bool(segments)))
            for i in range(m):
                self._count(self.stats.decode, None, 1, n - m + i + 1, ctx.seen - m + i + 1, sealed)
            return (merge(*parts) if segments else parts[0]).out
        outs = []
        for i in range(m):
            end = n - m + i + 1
            step = replace(ctx, seen=ctx.seen - m + i + 1, shared=ctx.shared.setdefault(f"query {i}", {}))
            entries = MixedEntries(tuple(segments) if mixed else (), k[:, :, :end], v[:, :, :end])
            step = reading_encoded(step, entries) if mixed else replace(step, segments=segments)
            outs.append(self._step(step, layer, q[:, :, i : i + 1], entries, row))
        return torch.cat(outs, dim=2)

    def _in_window(self, call: LayerCall, layer: KVLayer, window: Window) -> Tensor:
        """A step that may be recorded: the entries from before the window as the method reads them, and all of the window's."""
        q, (k, v) = call.q, window.frozen
        if self.watches:
            window.ask(q)
        ctx = self._context(call, None, layer, seen=layer.seen, phase="decode")
        join = partial(window.attend, scale=call.scale, softcap=call.softcap)
        if self.decode is None:
            parts = [read_segment(s, q, None, ctx) for s in layer.segments]
            parts += [read_tail(ctx, q, k, v, return_lse=True)] if window.begin else []
            sealed = sum(s.length for s in layer.segments)
            self._count(self.stats.decode, None, 1, window.begin + layer.seen - window.seen, layer.seen, sealed)
            return join(q, merge(*parts) if parts else None)
        self.stats.decode.add(layer.seen - window.seen, 0)
        step = beside(replace(ctx, shared=ctx.shared.setdefault("query 0", {}), segments=layer.segments), join)
        out = self._step(step, layer, q, MixedEntries((), k, v), None)
        if window.token is not None:
            raise ValueError(f"{self.decode.info.slug} has not attended through ctx.attend, so its steps can't be recorded")
        return out

    def end_window(self, layer: KVLayer, queries: Tensor | None) -> None:
        """After steps in a window: the policy sees their queries `(B, Hq, m, D)`, whose keys are the newest entries, and may act."""
        if self.policy is not None:
            if queries is not None and queries.shape[2]:
                slots = layer.open()
                self.policy.watch(self._context(None, None, layer, seen=layer.seen, phase="cache"), slots, queries)
                layer.close([(None, slots)])
            self._compress_if_due(layer)
        self.note_sizes(layer)

    @property
    def watches(self) -> bool:
        """Whether the policy looks at queries."""
        return self.policy is not None and type(self.policy).watch is not CachePolicy.watch

    def _over_encoded(self, layer: KVLayer) -> bool:
        """Whether a decode method reads entries that a cache policy of another name has encoded."""
        return self.decode is not None and self.decode != self.policy and any(segment.encoded for segment in layer.segments)

    def _step(self, ctx: LayerContext, layer: KVLayer, q: Tensor, entries: MixedEntries, row: int | None) -> Tensor:
        """One query by the decode method, with an index that is up to date."""
        assert self.decode is not None
        k, v = entries.shapes if entries.segments else (entries.k, entries.v)
        self.stats.decode.add(0, ctx.seen)
        policy = self.decode.layer_policy(self.layer, self.layers)
        if policy == "dense":
            return ctx.attend(q, k, v, None)
        if isinstance(policy, int):
            return ctx.attend(q, k, v, ctx.published(policy))
        bookkeeping = layer.states.get("observed", row)
        start = bookkeeping.get("n", 0)
        for begin, keys, values in entries.pieces(start):
            self.decode.observe(ctx, keys, values, begin)
        bookkeeping["n"] = max(start, k.shape[2])
        return self.decode.attend(ctx, q, k, v)

    # -- cache policies ----------------------------------------------------------------------------------------------------

    def before_append(self, layer: KVLayer, m: int) -> None:
        """A single token after a prompt: the prompt has ended, so the policy acts before the token is stored."""
        if m == 1 and layer.pending:
            self.end_prompt(layer)

    def after_crop(self, layer: KVLayer, removed: int) -> None:
        """Tokens were taken back: what was stored with them was a guess being verified, or a prompt with guesses at its end."""
        if self.decode is not None and layer.tail is not None:
            for row in layer.rows():
                n = layer.tail.n if row is None else layer.tail_row(row).keys.shape[2]
                if self._over_encoded(layer):
                    n = min(layer.lengths()[row or 0])
                bookkeeping = layer.states.get("observed", row)
                if bookkeeping.get("n", 0) > n:
                    ctx = self._context(None, row, layer, seen=layer.seen, phase="decode")
                    bookkeeping["n"] = self.decode.rewind(ctx, n)
        if layer.pending:
            was_prompt = layer.pending - removed > STEP_QUERIES or layer.pending - removed >= layer.seen
            if was_prompt:
                self.end_prompt(layer)
            else:
                layer.pending = 0
                self._compress_if_due(layer)

    def end_prompt(self, layer: KVLayer) -> None:
        """Let the cache policy act on all entries."""
        layer.pending = 0
        if self.policy is not None and layer.tail is not None:
            self._compress(layer, None)

    def _after(self, call: LayerCall, layer: KVLayer, rows: list[int | None]) -> None:
        if self.policy is None:
            return
        wide = self._wide(call, layer)
        opened = []
        # to open ragged storage is to copy it: only for policies that look
        for row in rows if self.watches else []:
            q, *_ = row_of_call(call, row, queries_only=True)
            slots = self._open(layer, row, wide)
            if q.shape[2]:
                ctx = self._context(call, row, layer, seen=layer.seen, phase="cache")
                self.policy.watch(ctx, slots, q)
            opened.append((row, slots))
        if opened:
            layer.close(opened)
        if call.q.shape[2] > 1 or layer.seen == 1:
            layer.pending += call.q.shape[2]
            # latents are expanded by the model before attention: scores can only be taken while they are at hand
            if self.when == "call" or wide is not None:
                layer.pending = 0
                self._compress(layer, wide)
        else:
            self._compress_if_due(layer, wide)

    def _compress_if_due(self, layer: KVLayer, wide: tuple[Tensor, Tensor] | None = None) -> None:
        if self.policy is None or layer.tail is None:
            return
        lengths = layer.full_precision_lengths()
        # rows that differ by padding reach their limits at different steps
        due = [
            row for row in layer.rows()
            if self.policy.due(
                self._context(None, row, layer, seen=layer.seen, phase="cache"), max(lengths) if row is None else lengths[row]
            )
        ]  # fmt: skip
        if due:
            self._compress(layer, wide, due)

    def _compress(
        self, layer: KVLayer, wide: tuple[Tensor, Tensor] | None, due: list[int | None] | None = None
    ) -> None:
        """Let the policy act on the rows that are due (default: all)."""
        assert self.policy is not None and layer.tail is not None
        opened = []
        for row in layer.rows():
            slots = self._open(layer, row, wide)
            if due is None or row in due:
                ctx = self._context(None, row, layer, seen=layer.seen, phase="cache")
                self.policy.compress(ctx, slots)
            opened.append((row, slots))
        # a decode method's slots run on through what is sealed, unless the sealed part is its own
        own = self.decode is not None and self.decode == self.policy
        moved = any(slots.moved if own else slots.reordered for _, slots in opened)
        layer.close(opened)
        if moved:
            for row in layer.rows():
                self._forget_index(layer, row)
        self.stats.compressions += 1
        self.note_sizes(layer)

    def _forget_index(self, layer: KVLayer, row: int | None) -> None:
        """Slots have moved: a decode method's index is made again from what is there."""
        if self.decode is not None:
            layer.states.get("decode", row).clear()
            layer.states.get("observed", row).clear()

    def _wide(self, call: LayerCall, layer: KVLayer) -> tuple[Tensor, Tensor] | None:
        """Expanded keys and values where the model stores latents, else None."""
        assert layer.tail is not None
        layer.rectangular = layer.plain and call.k.shape[1:] != layer.tail.keys.shape[1:]
        return (call.k, call.v) if layer.rectangular else None

    def _open(self, layer: KVLayer, row: int | None, wide: tuple[Tensor, Tensor] | None) -> Slots:
        slots = layer.open(row)
        if wide is None:
            return slots
        k, v = wide
        if row is not None:
            assert layer.tail is not None
            real = layer.tail.real
            k, v = (x[row : row + 1] if real is None else x[row : row + 1][:, :, real[row]] for x in wide)
        return Slots(slots.rectangle, k, v)

    # -- for those who run the model in parts ------------------------------------------------------------------------------

    @contextmanager
    def densely(self) -> Iterator[None]:
        """Inside the block calls on a filled cache run with full attention, and no decode or cache method takes notice of them."""
        decode, policy = self.decode, self.policy
        self.decode = self.policy = None
        try:
            yield
        finally:
            self.decode, self.policy = decode, policy

    def prompt_context(self, call: LayerCall, row: int | None, seen: int) -> LayerContext:
        """What a method may know of the first `seen` tokens of a prompt, before anything is stored."""
        return self._context(call, row, None, seen=seen, phase="prefill")

    # -- context and counts ------------------------------------------------------------------------------------------------

    def _context(self, call: LayerCall | None, row: int | None, layer: KVLayer | None, *, seen: int, phase: Phase) -> LayerContext:
        return layer_context(self, call or between_calls(layer), row, layer, seen, phase)

    def _count(self, pairs: Any, selection: Selection | None, n_q: int, n_k: int, seen: int, sealed: int = 0) -> None:
        """Add computed pairs, and the pairs dense attention over all `seen` tokens would have had."""
        pairs.add_call(1.0, n_q, n_k, selection, {})
        pairs.add(n_q * sealed, _visible(n_q, seen))

    def note_sizes(self, layer: KVLayer) -> None:
        """What the layer holds now, for the statistics."""
        self.stats.kept = layer.lengths()
        self.stats.kv_bytes, self.stats.index_bytes, self.stats.seen = layer.kv_bytes, layer.side_bytes, layer.seen
        self.stats.host_bytes = layer.host_bytes


def _visible(n_q: int, seen: int) -> float:
    """Pairs that dense attention computes for the last n_q of `seen` tokens."""
    return n_q * seen - n_q * (n_q - 1) / 2
